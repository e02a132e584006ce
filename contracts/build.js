// Compiles the contracts and writes worker/chain/artifacts/*.json (or the folder given): ABI, bytecode, storage layout
// and the digest of every source that went in. The same sources give the same bytes on every machine.
//
// usage: node build.js [FOLDER]     (after npm ci --ignore-scripts)
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const solc = require("solc");

const OUTPUTS = {
  SwarmCoordinator: "src/SwarmCoordinator.sol",
  ERC1967Proxy: "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol",
};

const locate = (name) => (name.startsWith("src/") ? path.join(__dirname, name) : require.resolve(name));

function compile() {
  const read = (name) => fs.readFileSync(locate(name), "utf8");
  const input = {
    language: "Solidity",
    sources: Object.fromEntries(Object.values(OUTPUTS).map((name) => [name, { content: read(name) }])),
    settings: {
      evmVersion: "shanghai",
      optimizer: { enabled: true, runs: 200 },
      metadata: { bytecodeHash: "none" },
      outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "storageLayout", "metadata"] } },
    },
  };
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: (name) => ({ contents: read(name) }) }));
  for (const problem of output.errors ?? []) process.stderr.write(problem.formattedMessage);
  if (output.errors?.length) process.exit(1); // a warning is an error too
  return output;
}

// What a later version must keep: each variable's name, slot, offset and type. The ids that solc gives to types differ
// from build to build of other sources, so they are left out.
function storageLayout(layout) {
  const types = layout.types ?? {};
  const plain = (type) => type.replace(/(t_(?:struct|enum|contract)\([^)]*\))\d+/g, "$1");
  const entry = (v) => ({ label: v.label, slot: v.slot, offset: v.offset, type: plain(v.type) });
  const structs = Object.entries(types)
    .filter(([, type]) => type.members)
    .map(([name, type]) => [plain(name), type.members.map(entry)]);
  return { variables: layout.storage.map(entry), structs: Object.fromEntries(structs.sort()) };
}

function artifact(output, name) {
  const contract = output.contracts[OUTPUTS[name]][name];
  const sources = Object.keys(JSON.parse(contract.metadata).sources).sort();
  const digest = crypto.createHash("sha256");
  for (const source of sources) digest.update(`${source}\n`).update(fs.readFileSync(locate(source)));
  return {
    contract: name,
    compiler: solc.version(),
    sources,
    source_sha256: digest.digest("hex"),
    abi: contract.abi,
    bytecode: `0x${contract.evm.bytecode.object}`,
    storage_layout: storageLayout(contract.storageLayout),
  };
}

const folder = process.argv[2] ?? path.join(__dirname, "..", "worker", "chain", "artifacts");
const output = compile();
fs.mkdirSync(folder, { recursive: true });
for (const name of Object.keys(OUTPUTS)) {
  fs.writeFileSync(path.join(folder, `${name}.json`), `${JSON.stringify(artifact(output, name), null, 1)}\n`);
}

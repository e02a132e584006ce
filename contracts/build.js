// Compiles contracts into JSON: ABI, bytecode, storage layout and the digest of every source that went in. The same
// sources give the same bytes on every machine. Called by scripts/contracts.
//
// usage: node build.js build [FOLDER [SOURCE.sol ...]]   each source gives the contract that has the file's name
//        node build.js release                           keep what a later upgrade must know of the versions in this build
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const solc = require("solc");

const ARTIFACTS = path.join(__dirname, "..", "worker", "chain", "artifacts");
const UPGRADEABLE = ["src/SwarmCoordinator.sol", "src/PredictionMarket.sol"];
const SOURCES = [...UPGRADEABLE, "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol"];

function locate(name) {
  if (name.startsWith("src/")) return path.join(__dirname, name);
  return path.isAbsolute(name) ? name : require.resolve(name);
}

function compile(sources) {
  const read = (name) => fs.readFileSync(locate(name), "utf8");
  const input = {
    language: "Solidity",
    sources: Object.fromEntries(sources.map((name) => [name, { content: read(name) }])),
    settings: {
      evmVersion: "shanghai",
      optimizer: { enabled: true, runs: 200 },
      metadata: { bytecodeHash: "none" },
      outputSelection: {
        "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object", "storageLayout", "metadata"] },
      },
    },
  };
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: (name) => ({ contents: read(name) }) }));
  // A warning is an error too, but for those about what others wrote.
  const isOurs = (problem) => problem.severity === "error" || !problem.sourceLocation?.file.startsWith("@");
  const problems = (output.errors ?? []).filter(isOurs);
  for (const problem of problems) process.stderr.write(problem.formattedMessage);
  if (problems.length) process.exit(1);
  return output;
}

// What a later version must keep: each variable's name, slot, offset and type, and what is in each struct. The ids that
// solc gives to types differ from build to build of other sources, so they are left out.
function storageLayout(layout) {
  const plain = (type) => type.replace(/(t_(?:struct|enum|contract)\([^)]*\))\d+/g, "$1");
  const entry = (v) => ({ label: v.label, slot: Number(v.slot), offset: v.offset, type: plain(v.type) });
  const structs = {};
  for (const [id, type] of Object.entries(layout.types ?? {})) {
    if (!type.members) continue;
    const name = plain(id);
    if (name in structs) throw new Error(`two structs are called ${name}: rename one, layouts are compared by name`);
    structs[name] = { bytes: Number(type.numberOfBytes), members: type.members.map(entry) };
  }
  return { variables: layout.storage.map(entry), structs: Object.fromEntries(Object.entries(structs).sort()) };
}

const sha256 = (content) => crypto.createHash("sha256").update(content).digest("hex");

function artifact(output, source) {
  const name = path.basename(source, ".sol");
  const contract = output.contracts[source][name];
  const sources = Object.keys(JSON.parse(contract.metadata).sources).sort();
  const version = /return "(hivewright\/\d+)";/.exec(fs.readFileSync(locate(source), "utf8"));
  const contents = sources.map((file) => `${file}\n${fs.readFileSync(locate(file), "utf8")}`);
  return {
    contract: name,
    ...(version && { version: version[1] }),
    compiler: solc.version(),
    sources,
    source_sha256: sha256(contents.join("")),
    abi: contract.abi,
    bytecode: `0x${contract.evm.bytecode.object}`,
    // Of the code on the chain, with zeros where the deployment puts the contract's own address.
    runtime_sha256: sha256(Buffer.from(contract.evm.deployedBytecode.object, "hex")),
    storage_layout: storageLayout(contract.storageLayout),
  };
}

function write(file, content) {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  fs.writeFileSync(file, `${JSON.stringify(content, null, 1)}\n`);
}

function build(folder = ARTIFACTS, ...sources) {
  if (sources.length === 0) sources = SOURCES;
  const output = compile(sources);
  for (const source of sources) {
    const built = artifact(output, source);
    write(path.join(folder, `${built.contract}.json`), built);
  }
}

function release() {
  const output = compile(UPGRADEABLE);
  for (const source of UPGRADEABLE) {
    const { contract, version, runtime_sha256, storage_layout } = artifact(output, source);
    const file = path.join(ARTIFACTS, "releases", contract, `${path.basename(version)}.json`);
    if (!fs.existsSync(file)) {
      write(file, { version, runtime_sha256, storage_layout });
    } else if (JSON.parse(fs.readFileSync(file)).runtime_sha256 !== runtime_sha256) {
      throw new Error(`${file}: released already with other code; give the contract a new version()`);
    }
  }
}

const commands = { build, release };
commands[process.argv[2]](...process.argv.slice(3));

#!/usr/bin/env node
// The pinned solc, as forge wants to call one: --version, or --standard-json on standard input.
"use strict";
const solc = require("solc");

if (process.argv.includes("--standard-json")) {
  process.stdout.write(solc.compile(require("node:fs").readFileSync(0, "utf8")));
} else {
  process.stdout.write(`solc, the solidity compiler commandline interface\nVersion: ${solc.version()}\n`);
}

"""Tests of the import rules in docs/architecture.md, checked on the source."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("worker", "deploys", "lab")

GROUND = {
    "worker.runtime",
    "worker.errors",
    "worker.log",
    "worker.multiaddr",
    "worker.settings",
    "worker.records",
}
WEB = {"worker.runtime.webguard", "worker.runtime.webpages", "worker.runtime.webservice"}

# Package or module -> the parts of our own that it may import, besides itself. The longest name
# that fits decides.
MAY_IMPORT = {
    "worker.errors": set(),
    "worker.log": set(),
    "worker.multiaddr": set(),
    "worker.settings": {"worker.errors", "worker.multiaddr", "worker.runtime.state_dir"},
    "worker.records": {"worker.errors"},
    "worker.runtime": {"worker.errors", "worker.log"},
    "worker.runtime.state_dir": set(),
    "worker.runtime.webservice": {
        "worker.errors",
        "worker.log",
        "worker.settings",
        "worker.runtime",
    },
    "worker.environments": GROUND,
    "worker.environments.answers": set(),
    "worker.policy": GROUND | {"worker.environments.answers"},
    "worker.policy.engines": GROUND | {"worker.policy"},
    "worker.trainer": GROUND | {"worker.policy"},
    "worker.swarm": GROUND,
    "worker.swarm.identity": {"worker.errors"},
    "worker.chain": GROUND | {"worker.swarm.identity"},
    "worker.account": GROUND
    | WEB
    | {"worker.chain", "worker.swarm.identity", "worker.market_view"},
    "worker.dashboard": GROUND
    | WEB
    | {
        "worker.chain.coordinator",
        "worker.swarm.identity",
        "worker.telemetry.answer_log",
        "worker.market_view",
    },
    "worker.market_view": GROUND
    | {"worker.chain", "worker.swarm.identity", "worker.market.judge_client"},
    "worker.market": GROUND | {"worker.chain"},
    "worker.judge": GROUND | WEB | {"worker.chain", "worker.environments"},
    "worker.hub": GROUND,
    "worker.telemetry": GROUND | {"worker.swarm.status", "worker.hub"},
    # swarm.identity: a key that the inventory names is read before it goes to a host; needs
    # `cryptography` alone.
    "deploys": {
        "worker.settings",
        "worker.multiaddr",
        "worker.errors",
        "worker.log",
        "worker.runtime",
        "worker.swarm.identity",
    },
    # The test hosts are equipment: only tests, benchmarks and inventory/lab.py use them, and they
    # are not packaged.
    "lab": {"worker.errors", "deploys"},
}

# foreign package -> the only parts of ours that may import it
ONLY_IN = {
    "hivemind": {"worker.swarm"},
    "web3": {"worker.chain"},
    "torch": {"worker.policy", "worker.trainer"},
    "transformers": {"worker.policy", "worker.trainer"},
    "vllm": {"worker.policy"},
    "reasoning_gym": {"worker.environments"},
    "aiohttp": {
        "worker.chain.embedded.door",
        *WEB,
        *(part for part, allowed in MAY_IMPORT.items() if allowed >= WEB),
    },
    "pyinfra": {"deploys", "lab"},
    "pyinfra_cli": {"deploys"},
}


def modules():
    for folder in PACKAGES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, file


def imports_of(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` means the module, `from module import name` the module it
            # is from.
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from {
                f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names
            }


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("name", "file"), [pytest.param(n, f, id=n) for n, f in modules()])
def test_module_imports_only_what_the_table_allows(name, file):
    rules = [part for part in MAY_IMPORT if is_in(name, part)]
    imported = list(imports_of(file))
    if rules:
        rule = max(rules, key=len)
        allowed = MAY_IMPORT[rule] | {rule}
        ours = [m for m in imported if any(is_in(m, package) for package in PACKAGES)]
        wrong = [m for m in ours if not any(is_in(m, part) for part in allowed)]
        assert not wrong, f"{name} imports {wrong}; it may import {sorted(allowed)}"
    for foreign, places in ONLY_IN.items():
        if any(is_in(m, foreign) for m in imported):
            assert any(is_in(name, place) for place in places), (
                f"{name} imports {foreign}; only {sorted(places)} may"
            )
    if is_in(name, "worker"):
        wrong = [m for m in imported if is_in(m, "deploys") or is_in(m, "lab")]
        assert not wrong, f"{name}: worker never imports {wrong}"


def test_no_role_computes_curves_that_it_has_no_key_on():
    """Encrypted keys are made and opened without them."""
    command = (
        "import sys; from worker.runtime import entry_point\n"
        "entry_point.load('worker.chain.keeper:run')\n"
        "from eth_account import Account\n"
        "key = Account.create().key\n"
        "assert Account.decrypt(Account.encrypt(key, 'p', 'scrypt', 2), 'p') == key\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = done.stdout.split()
    assert "eth_keyfile.keyfile" in loaded
    assert not [name for name in loaded if name.startswith("py_ecc.optimized")]


def test_endpoint_of_metrics_imports_no_chain():
    """All processes have it, also those that never speak to a chain."""
    command = "import sys, worker.metrics_endpoint; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=60
    )
    assert {"web3", "torch", "hivemind", "aiohttp", "jinja2"}.isdisjoint(done.stdout.split())


def test_names_of_test_modules_are_unique():
    """Test modules need unique names.

    The import mode of pytest uses their bare names and refuses the second module of a name.
    """
    names = [
        file.name
        for file in (ROOT / "tests").rglob("*.py")
        if file.name not in ("__init__.py", "conftest.py")
    ]
    assert sorted(names) == sorted(set(names))


def test_names_of_modules_tell_them_apart():
    """A file name means one thing; for a server and a status the package says whose it is."""
    names = Counter(file.stem for _, file in modules())
    assert {name for name, count in names.items() if count > 1} <= {"__init__", "server", "status"}

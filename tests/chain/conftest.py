"""A real chain: one anvil per test process, on a free port, and a new contract per test."""

import fcntl
import json
import os
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from tests.chain.hall import Hall, open_hall
from worker import settings
from worker.chain import contract
from worker.chain.client import Call, Receipt
from worker.chain.coordinator import Coordinator
from worker.chain.deployment import Deployment
from worker.chain.embedded import anvil, pruning

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Chain:
    """A deployed contract. `settings` has its deployment file, and its owner's key."""

    settings: settings.Settings
    deployment: Deployment
    owner: LocalAccount
    coordinator: Coordinator

    def send(self, account: LocalAccount, call: Call) -> Receipt:
        return self.coordinator.transact(account, call, PATIENCE_SECONDS)

    def advance(self) -> None:
        self.send(self.owner, self.coordinator.update_stage_and_round())

    def peers_of(self, account: str) -> list[str]:
        """Return the peers that the account registered."""
        return self.coordinator.read("getPeerId(address[])", [account])[0]

    def new_account(self, *peer_ids: str) -> LocalAccount:
        """Return a new account (gas costs nothing here) that has registered the peers."""
        account = Account.create()
        for peer_id in peer_ids:
            self.send(account, self.coordinator.register_peer(peer_id))
        return account


@pytest.fixture(scope="session")
def anvil_binary() -> Path:
    """Return the pinned anvil, as `make` installs it."""
    printed = subprocess.run(
        [ROOT / "scripts/anvil", ROOT / ".cache/node"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return Path(printed.strip())


@pytest.fixture(scope="session")
def rpc_url(tmp_path_factory, anvil_binary):
    """Run an anvil that all tests of this process share.

    It is never restarted, so it need not write its state, which grows with every test.
    """
    folder = tmp_path_factory.mktemp("anvil")
    section = settings.Anvil(port=0, state_file=folder / "state.json", binary=anvil_binary)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pruning, "dump_seconds", lambda state_file: 3600)
            _, url = stack.enter_context(anvil.running(section, settings.Chain().id))
        yield url


@pytest.fixture
def chain(rpc_url, tmp_path) -> Chain:
    return deployed(rpc_url, tmp_path)


def deployed(rpc_url: str, folder: Path) -> Chain:
    """Deploy a new contract with a new owner, at round 0."""
    raw = {
        "chain": {"rpc_url": rpc_url, "deployment_file": str(folder / "keeper/deployment.json")},
        "keeper": {"state_dir": str(folder / "keeper")},
        "audit": {"every_rounds": 0},
    }
    parsed = settings.parse(raw, "test")
    deployment = anvil.deploy(parsed)
    coordinator = Coordinator(parsed.chain)
    coordinator.check()
    return Chain(parsed, deployment, anvil.load_owner(parsed.keeper), coordinator)


@pytest.fixture
def hall(chain) -> Hall:
    """Deploy a market next to the contract, with three peers."""
    return open_hall(chain)


@pytest.fixture(scope="session")
def foreign_build(tmp_path_factory, anvil_binary) -> dict:
    """Compile a foreign contract with RL Swarm's ABI, with the pinned solc."""
    return _built("ForeignCoordinator", tmp_path_factory)


@pytest.fixture(scope="session")
def foreign_build_060(tmp_path_factory, anvil_binary) -> dict:
    """Compile a foreign contract with the ABI of release 0.6.0."""
    return _built("ForeignCoordinator060", tmp_path_factory)


@pytest.fixture(scope="session")
def foreign_market_build(tmp_path_factory, anvil_binary) -> dict:
    """Compile a foreign prediction market."""
    return _built("ForeignMarket", tmp_path_factory)


def _built(name: str, tmp_path_factory) -> dict:
    """Compile a foreign contract, once for all processes of the run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has a folder of its own in it
    built = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            source = ROOT / f"tests/chain/foreign/{name}.sol"
            command = [ROOT / "scripts/contracts", "build", folder / name, source]
            subprocess.run(command, check=True, timeout=240)
            (folder / name / f"{name}.json").rename(built)
    return json.loads(built.read_text())


@pytest.fixture
def foreign(chain, foreign_build) -> Chain:
    """Deploy the foreign contract on the same chain, with the same owner, in place of ours."""
    address = chain.send(
        chain.owner, Call("create", bytes.fromhex(foreign_build["bytecode"][2:]), None)
    ).contract
    deployed = _in_place_of_ours(chain, address)
    deployed.send(
        chain.owner, deployed.coordinator.call("initialize(address)", chain.owner.address)
    )
    return deployed


@pytest.fixture
def foreign_060(chain, foreign_build_060) -> Chain:
    """Deploy a contract of release 0.6.0 behind a proxy, in place of ours."""
    code = bytes.fromhex(foreign_build_060["bytecode"][2:])
    implementation = chain.send(chain.owner, Call("create", code, None)).contract
    proxy = Call("create", contract.proxy_data(chain.owner.address, implementation), None)
    return _in_place_of_ours(chain, chain.send(chain.owner, proxy).contract)


def _in_place_of_ours(chain: Chain, address: str) -> Chain:
    section = chain.settings.chain.model_copy(update={"contract": address})
    client = Coordinator(section)
    client.check()
    return Chain(
        chain.settings.model_copy(update={"chain": section}), client.deployment, chain.owner, client
    )


@pytest.fixture
def place(tmp_path, anvil_binary) -> settings.Settings:
    """Return settings of a host with chain and keeper; the kernel chooses the port."""
    raw = {
        "anvil": {
            "port": 0,
            "state_file": str(tmp_path / "chain/state.json"),
            "binary": str(anvil_binary),
        },
        "keeper": {"state_dir": str(tmp_path / "host")},
        "chain": {"deployment_file": str(tmp_path / "host/deployment.json")},
    }
    (tmp_path / "settings.yaml").write_text(settings.dump(settings.parse(raw, "test")))
    return settings.load(tmp_path / "settings.yaml")

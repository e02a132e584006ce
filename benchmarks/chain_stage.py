"""A real chain with our contract, and what the benchmarks of chain.py run on it."""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from worker import settings
from worker.account.vault import Tokens
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.ledger import Ledger
from worker.chain.transaction_queue import Sender
from worker.errors import ChainError
from worker.settings import Settings

PATIENCE_SECONDS = 300.0
"""Limit of a wait: long, since shared machines are slow at times."""


@dataclass(frozen=True)
class Stage:
    """A chain with a new contract, and a folder for everything."""

    folder: Path
    settings: Settings
    owner: LocalAccount
    coordinator: Coordinator

    @property
    def rpc_url(self) -> str:
        return self.coordinator.deployment.rpc_url

    def register(self, account: LocalAccount, peers: Sequence[str]) -> None:
        with closing(
            Sender(self.coordinator, account, self.folder / f"{account.address}.db")
        ) as sender:
            for peer in peers:
                sender.send(self.coordinator.register_peer(peer))
            wait_until(lambda: sender.tend() == 0, "registrations")

    def advance(self, rounds: int) -> None:
        """End this many rounds; the calls are equal, so each gets its own nonce here."""
        nonce = self.coordinator.nonce(self.owner.address)
        call = self.coordinator.update_stage_and_round()
        before = self.coordinator.current_round()
        gas = 2 * self.coordinator.estimate_gas(self.owner.address, call)
        for number in range(nonce, nonce + rounds):
            _, raw = self.coordinator.sign(self.owner, call, nonce=number, gas=gas, gas_price_wei=0)
            self.coordinator.send_raw(raw)
        wait_until(lambda: self.coordinator.current_round() == before + rounds, "rounds")


@contextmanager
def stage() -> Iterator[Stage]:
    """Yield anvil in its default configuration, except port and history, and our contract on it."""
    with tempfile.TemporaryDirectory(prefix="hivewright-chain-") as name:
        folder = Path(name)
        # Events of rounds that the node has dropped could not be counted.
        section = settings.Anvil(
            port=0, state_file=folder / "chain/state.json", history_blocks=10**6
        )
        with anvil.running(section, settings.Chain().id) as (_, url):
            raw = {
                "chain": {"rpc_url": url, "poll_seconds": 0.2},
                "keeper": {"state_dir": str(folder / "keeper")},
                "account": {"state_dir": str(folder / "account"), "port": 0},
            }
            parsed = settings.parse(raw, "benchmark")
            with redirect_stdout(sys.stderr):
                contract = anvil.deploy(parsed).contract
            chain = parsed.chain.model_copy(update={"contract": contract})
            parsed = parsed.model_copy(update={"chain": chain})
            coordinator = Coordinator(chain)
            coordinator.check()
            yield Stage(folder, parsed, anvil.load_owner(parsed.keeper), coordinator)


@contextmanager
def account_service(on: Stage, rpc_urls: Sequence[str] = ()) -> Iterator[tuple[str, LocalAccount]]:
    """`hivewright account` as a process of its own: its URL, and the account that it sends from."""
    chain = on.settings.chain.model_copy(
        update={"rpc_url": tuple(rpc_urls) or on.settings.chain.rpc_url, "timeout_seconds": 10.0}
    )
    file = on.folder / "account.yaml"
    file.write_text(settings.dump(on.settings.model_copy(update={"chain": chain})))
    address = on.settings.account.state_dir / "address"
    with (on.folder / "account.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "account", "--settings", file],
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: address.exists() or process.poll() is not None, "account service")
        yield (
            address.read_text().strip(),
            Account.from_key((on.settings.account.state_dir / "account.key").read_text().strip()),
        )
    finally:
        process.terminate()
        process.wait(20)


def client(on: Stage, url: str, peer: str, **changes: object) -> AccountClient:
    """Return a node's client, with its token; its folder is named after the peer."""
    folder = on.folder / "nodes" / peer
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "account.token").write_text(Tokens(on.settings.account.state_dir).issue(peer))
    return AccountClient(node_chain(on, url, **changes), folder)


def node_chain(on: Stage, url: str, **changes: object) -> settings.Chain:
    usual = {"account_url": url, "timeout_seconds": 10.0, "poll_seconds": 0.2}
    return on.settings.chain.model_copy(update={**usual, **changes})


def peer_names(count: int) -> list[str]:
    """Names in the alphabet of peer ids."""
    return [
        "Qm" + "".join("123456789ABCDEFGH"[int(digit, 16)] for digit in f"{i:04x}")
        for i in range(count)
    ]


def assert_exactly_once(on: Stage, peers: Sequence[str]) -> int:
    """Assert that the chain has every row of every ledger and nothing more; return their number."""
    rewards: Counter[tuple[int, str, int]] = Counter(
        (event.arguments["roundNumber"], event.arguments["peerId"], event.arguments["reward"])
        for event in on.coordinator.events("RewardSubmitted")
    )
    votes: Counter[tuple[int, str, str]] = Counter(
        (
            event.arguments["roundNumber"],
            event.arguments["peerId"],
            ",".join(event.arguments["winners"]),
        )
        for event in on.coordinator.events("WinnerSubmitted")
    )
    rows = []
    for peer in peers:
        with closing(Ledger(on.folder / "nodes" / peer / "ledger.db")) as ledger:
            rows += ledger.rows()
    assert {row.reward_state for row in rows} == {"confirmed"}
    assert {row.vote_state for row in rows if row.winners} == {"confirmed"}
    assert rewards == Counter({(row.round, row.peer_id, row.reward): 1 for row in rows})
    assert votes == Counter(
        {(row.round, row.peer_id, ",".join(row.winners)): 1 for row in rows if row.winners}
    )
    totals = dict(zip(peers, on.coordinator.total_rewards(list(peers)), strict=True))
    assert totals == {
        peer: sum(row.reward for row in rows if row.peer_id == peer) for peer in peers
    }
    return len(rows)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ChainError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)

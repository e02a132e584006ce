"""Settlement under faults: no service, a chain that forgets, bad networks, kill -9, a bug."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from account_service import account_settings, at_random, eventually, faulty, serving
from settling import SettlingNode, advance, impatience, settling_node, settling_service  # noqa: F401 - fixtures

from worker import settings
from worker.chain import settlement as settlement_module
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger, Row
from worker.chain.settlement import Settlement
from worker.errors import WorkerError

# Settles what the ledger holds until it is killed; ends by itself after 20 s.
SETTLER = """
import sys
from pathlib import Path
from worker import settings
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger
from worker.chain.settlement import Settlement
folder = Path(sys.argv[1])
chain = settings.Chain(account_url=sys.argv[2], poll_seconds=0.1)
reads = Coordinator(settings.chain_of_node(chain, folder))
settling = Settlement(Ledger(folder / "ledger.db"), reads, AccountClient(chain, folder), chain)
print("ready", flush=True)
settling.start()
settling.flush(60)
"""


@pytest.fixture
def snapshot(chain) -> Iterator[Callable[[], None]]:
    """Return a function that makes the chain forget everything since the test began."""

    def rpc(method: str, *params: object) -> object:
        answer = chain.coordinator.web3.provider.make_request(method, list(params))
        assert "error" not in answer, answer
        return answer["result"]

    taken = rpc("evm_snapshot")

    def forget() -> None:
        nonlocal taken
        assert rpc("evm_revert", taken)
        taken = rpc("evm_snapshot")

    return forget


# ---- a chain that is away, or forgets


def test_unreachable_account_service_is_waited_for(chain, tmp_path, tmp_path_factory) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    with serving(parsed) as service:
        node = SettlingNode(chain, service, tmp_path / "node", tmp_path_factory.getbasetemp())
        port = int(service.url.rpartition(":")[2])
    node.earn(0)
    with node.settling() as settling:
        eventually(lambda: settling.status().last_error)
        assert "no connection" in settling.status().last_error
        started = time.monotonic()
        assert not settling.flush(1.0)
        assert time.monotonic() - started < 10
        with serving(parsed, port):
            assert settling.flush(60)
            assert settling.status().last_error is None
    node.assert_exactly_once()


def test_what_was_answered_but_never_arrived_is_sent_again(service, node, monkeypatch) -> None:
    monkeypatch.setattr(settlement_module, "RESEND_SECONDS", 0.5)
    node.earn(0)
    lies = iter([True, True])
    with faulty(
        service.url, lambda seen: "lie" if "submit" in seen and next(lies, None) else None
    ) as proxy:
        node.settle(account_url=proxy.url)
    node.assert_exactly_once()
    assert next(lies, None) is None
    assert node.ledger.rows()[0].reward_hash != "0x" + "11" * 32


def test_chain_that_forgot_everything_is_told_again_at_the_next_start(
    chain, node, snapshot
) -> None:
    snapshot()
    advance(chain, 2)
    node.earn(0, 1, 2)
    node.settle()
    snapshot()
    assert chain.coordinator.total_rewards([node.peer_id]) == [0]
    advance(chain, 2)
    with node.settling() as settling:
        eventually(lambda: settling.status().confirmed < 3 or node.ledger.unsettled())
        assert settling.flush(60)
    node.assert_exactly_once()


def test_chain_that_forgot_also_the_registration_gets_it_again(
    chain, service, tmp_path, tmp_path_factory, snapshot
) -> None:
    node = SettlingNode(chain, service, tmp_path / "node", tmp_path_factory.getbasetemp())
    node.earn(0)
    node.settle()
    snapshot()
    assert chain.coordinator.owner_of(node.peer_id) is None
    node.earn(0)
    with node.settling():
        eventually(lambda: chain.coordinator.submitted_reward(0, 0, node.peer_id) == 100)
        eventually(lambda: not node.ledger.unsettled())
    node.assert_exactly_once()


def test_chain_that_forgets_while_we_run_is_noticed(chain, node, snapshot, monkeypatch) -> None:
    monkeypatch.setattr(settlement_module, "RECHECK_SECONDS", 1.0)
    snapshot()
    node.earn(0)
    with node.settling(is_flushed=True):
        snapshot()
        assert chain.coordinator.submitted_reward(0, 0, node.peer_id) is None
        eventually(lambda: chain.coordinator.submitted_reward(0, 0, node.peer_id) == 100)
        eventually(lambda: chain.coordinator.votes(0, node.peer_id))
    node.settle()  # the account service may have sent it again before the settlement noticed
    node.assert_exactly_once()


# ---- faults


def test_faults_on_both_ways_lose_and_double_nothing(chain, service, node, monkeypatch) -> None:
    monkeypatch.setattr(settlement_module, "RESEND_SECONDS", 2.0)
    monkeypatch.setattr(settlement_module, "_MAX_BACKOFF_SECONDS", 0.3)
    advance(chain, 7)
    node.earn(*range(8))
    with (
        faulty(service.url, at_random(3, 0.2)) as account,
        faulty(chain.deployment.rpc_url, at_random(4, 0.1)) as rpc,
        node.settling(
            account_url=account.url,
            rpc_url=rpc.url,
            contract=chain.deployment.contract,
            timeout_seconds=2.0,
        ) as settling,
    ):
        assert settling.flush(40), (settling.status(), node.states())
    node.assert_exactly_once()


def test_backlog_gets_through_an_account_service_that_fails_now_and_then(
    chain, service, node
) -> None:
    """Each walk makes some progress; pauses that double with every failure would take minutes."""
    advance(chain, 39)
    node.earn(*range(40))
    count = iter(range(10**6))
    fault = lambda seen: "drop" if "submit" in seen and next(count) % 8 == 7 else None  # noqa: E731
    with faulty(service.url, fault) as account:
        parsed = {
            "account_url": account.url,
            "rpc_url": (chain.deployment.rpc_url,),
            "poll_seconds": 0.5,
        }
        started = time.monotonic()
        node.settle(contract=chain.deployment.contract, **parsed)
        assert time.monotonic() - started < 50
    node.assert_exactly_once()


def test_killed_while_settling_loses_and_doubles_nothing(chain, service, node) -> None:
    advance(chain, 14)
    node.earn(*range(15))
    rng = random.Random(5)
    for _ in range(2):
        settler = subprocess.Popen(
            [sys.executable, "-c", SETTLER, str(node.folder), service.url],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert settler.stdout is not None
        assert settler.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 0.4))
        settler.kill()
        settler.wait(10)
        settler.stdout.close()
    node.settle()
    node.assert_exactly_once()


def test_another_chain_is_said_and_nothing_is_rejected(node) -> None:
    node.earn(0)
    with node.settling(id=1) as settling:
        node.ledger.queue()
        node.ledger.sent(node.ledger.rows()[0], "reward", "0x1")
        settling.wake()
        eventually(lambda: settling.status().last_error)
        assert "chain id 31337" in settling.status().last_error
    assert node.ledger.rows()[0].reward_state == "sent"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_dies_is_told_and_not_hidden(node, monkeypatch) -> None:
    def broken() -> list[Row]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(node.ledger, "unsettled", broken)
    with node.settling() as settling:
        settling._thread.join(10)
        with pytest.raises(WorkerError, match="settlement ended by itself"):
            settling.status()


def test_close_without_start_and_twice_is_fine(tmp_path) -> None:
    parsed = settings.Chain(account_url="http://127.0.0.1:9")
    ledger = Ledger(tmp_path / "ledger.db")
    settling = Settlement(
        ledger,
        Coordinator(settings.chain_of_node(parsed, tmp_path)),
        AccountClient(parsed, tmp_path),
        parsed,
    )
    assert settling.status().earned == 0
    settling.close()
    settling.close()

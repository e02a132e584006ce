import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from account_service import (
    ENROLMENT_TOKEN,
    Running,
    account_settings,
    at_random,
    eventually,
    faulty,
    serving,
    some_identity,
)

from worker import settings
from worker.chain import sender as sender_module
from worker.chain import settlement as settlement_module
from worker.chain.accounts import AccountClient, enrol
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger, Row
from worker.chain.settlement import Settlement
from worker.errors import ContractRefused, WorkerError

# Settles what the ledger holds until it is killed; ends by itself after 20 s.
SETTLER = """
import sys
from pathlib import Path
from worker import settings
from worker.chain.accounts import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger
from worker.chain.settlement import Settlement
folder = Path(sys.argv[1])
chain = settings.Chain(account_url=sys.argv[2], poll_seconds=0.1)
settling = Settlement(Ledger(folder / "ledger.db"), Coordinator(chain), AccountClient(chain, folder), chain)
print("ready", flush=True)
settling.start()
settling.flush(60)
"""


class Node:
    """An enrolled node with a ledger, which can be settled by one Settlement after the other."""

    def __init__(self, chain, service: Running, folder: Path, shared: Path) -> None:
        self.chain = chain
        self.service = service
        self.folder = folder
        self.identity = some_identity(shared)
        self.peer_id = self.identity.peer_id
        enrol(self.identity, ENROLMENT_TOKEN, service.node_chain(), folder)
        self.ledger = Ledger(folder / "ledger.db")

    def earn(self, *rounds: int) -> None:
        for round in rounds:
            self.ledger.record(round, 0, self.peer_id, 100 + round, ["w" * (round + 1)])

    @contextmanager
    def settling(self, is_flushed: bool = False, **changes: object) -> Iterator[Settlement]:
        parsed = self.service.node_chain(**changes)
        settling = Settlement(self.ledger, Coordinator(parsed), AccountClient(parsed, self.folder), parsed)
        settling.start()
        try:
            if is_flushed:
                assert settling.flush(60), (settling.status(), self.ledger.unsettled())
            yield settling
        finally:
            settling.close()

    def settle(self, **changes: object) -> None:
        with self.settling(is_flushed=True, **changes):
            pass

    def states(self) -> list[tuple[str, str | None]]:
        return [(row.reward_state, row.vote_state) for row in self.ledger.rows()]

    def assert_exactly_once(self) -> None:
        """The chain holds every row of the ledger, and nothing more."""
        rows = self.ledger.rows()
        read = self.chain.coordinator
        assert {(row.reward_state, row.vote_state) for row in rows} == {("confirmed", "confirmed")}
        assert read.total_rewards([self.peer_id]) == [sum(row.reward for row in rows)]
        for row in rows:
            assert read.submitted_reward(row.round, row.stage, row.peer_id) == row.reward
            assert read.votes(row.round, row.peer_id) == list(row.winners)


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """What the chain forgot while the account service still waited for it to be mined is sent again soon."""
    monkeypatch.setattr(sender_module, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(settlement_module, "RESEND_SECONDS", 5.0)


@pytest.fixture
def service(chain, tmp_path):
    with serving(account_settings(chain.settings, tmp_path / "account")) as running:
        yield running


@pytest.fixture
def node(chain, service, tmp_path, tmp_path_factory) -> Node:
    return Node(chain, service, tmp_path / "node", tmp_path_factory.getbasetemp())


def advance(chain, rounds: int) -> None:
    for _ in range(rounds):
        chain.advance()


@pytest.fixture
def snapshot(chain) -> Iterator[Callable[[], None]]:
    """Call it to make the chain forget everything since the test began."""

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


# ---- when all goes well


def test_rewards_and_votes_are_confirmed_with_hash_and_block(chain, node) -> None:
    advance(chain, 2)
    node.earn(0, 1, 2)
    with node.settling() as settling:
        eventually(lambda: settling.status().confirmed == 3 and not node.ledger.unsettled())
        status = settling.status()
    node.assert_exactly_once()
    assert (status.earned, status.sent, status.confirmed, status.rejected, status.last_error) == (3, 0, 3, 0, None)
    for row in node.ledger.rows():
        for tx_hash, block in ((row.reward_hash, row.reward_block), (row.vote_hash, row.vote_block)):
            receipt = chain.coordinator.receipt(tx_hash)
            assert (receipt.succeeded, receipt.block) == (True, block)


def test_recording_wakes_it(node) -> None:
    with node.settling(poll_seconds=30.0) as settling:
        time.sleep(0.2)
        node.earn(0)
        settling.wake()
        eventually(lambda: node.states() == [("sent", "sent")], 5)


def test_rewards_wait_for_their_batch_and_flush_does_not(chain, node) -> None:
    advance(chain, 4)
    with node.settling(submit_every_rounds=3) as settling:
        node.earn(0, 1)
        settling.wake()
        time.sleep(0.5)
        assert node.states() == [("earned", "earned")] * 2
        node.earn(2)
        settling.wake()
        eventually(lambda: node.states() == [("confirmed", "confirmed")] * 3)
        node.earn(3)
        assert settling.flush(10)
    node.assert_exactly_once()


def test_rewards_wait_no_longer_than_their_minutes(chain, node) -> None:
    advance(chain, 1)
    with node.settling(submit_every_rounds=None, submit_every_minutes=0.02) as settling:
        node.earn(0)
        settling.wake()
        time.sleep(0.4)
        assert node.states() == [("earned", "earned")]
        node.earn(1)
        eventually(lambda: node.states() == [("confirmed", "confirmed")] * 2, 20)
    assert all(row.reward_sent_at - node.ledger.rows()[0].earned_at >= 1.2 for row in node.ledger.rows())


def test_whichever_of_rounds_and_minutes_comes_first_sends(chain, node) -> None:
    advance(chain, 1)
    with node.settling(submit_every_rounds=2, submit_every_minutes=60.0) as settling:
        node.earn(0)
        settling.wake()
        time.sleep(0.4)
        assert node.states() == [("earned", "earned")]
        node.earn(1)
        settling.wake()
        eventually(lambda: node.states() == [("confirmed", "confirmed")] * 2, 20)


def test_digest_of_the_groups_travels_with_the_reward(chain, node) -> None:
    node.ledger.record(0, 0, node.peer_id, 5, [], "0f" * 32)
    node.settle()
    (row,) = node.ledger.rows()
    assert chain.coordinator.reward_digest(row.reward_hash) == "0f" * 32


def test_row_without_winners_has_no_vote(chain, node) -> None:
    node.ledger.record(0, 0, node.peer_id, 5, [])
    node.settle()
    assert node.states() == [("confirmed", None)]
    assert chain.coordinator.votes(0, node.peer_id) == []


# ---- what the chain has already, or refuses


def test_what_we_submitted_before_a_crash_is_success(chain, service, node) -> None:
    node.earn(0)
    client = AccountClient(service.node_chain(), node.folder)
    client.submit_reward(0, 0, 100, node.peer_id)
    client.submit_winner(0, ["w"], node.peer_id)
    deadline = time.monotonic() + 30
    while not chain.coordinator.has_voted(0, node.peer_id) and time.monotonic() < deadline:
        time.sleep(0.02)  # sent is not mined
    nonce = chain.coordinator.nonce(service.service.address)
    node.settle()
    node.assert_exactly_once()
    assert chain.coordinator.nonce(service.service.address) == nonce


def test_other_values_on_the_chain_reject_ours_and_name_both(chain, service, node) -> None:
    node.earn(0)
    client = AccountClient(service.node_chain(), node.folder)
    client.submit_reward(0, 0, 7, node.peer_id)
    client.submit_winner(0, ["v"], node.peer_id)
    node.settle()
    (row,) = node.ledger.rows()
    assert node.states() == [("rejected", "rejected")]
    cause = "the chain's stands; most likely another process uses this node's identity: stop one of them"
    assert row.reward_reason == f"the chain holds 7, this ledger 100; {cause}"
    assert row.vote_reason == f"the chain holds ['v'], this ledger ['w']; {cause}"


def test_one_mixed_up_answer_rejects_nothing(node, monkeypatch) -> None:
    node.earn(0)
    truth, lies = Coordinator.submitted_reward, iter([7])
    monkeypatch.setattr(Coordinator, "submitted_reward", lambda *place: next(lies, None) or truth(*place))
    node.settle()
    assert next(lies, None) is None
    node.assert_exactly_once()


def test_refused_vote_is_rejected_once_and_the_reward_stands(service, node) -> None:
    node.ledger.record(0, 0, node.peer_id, 5, ["same", "same"])
    with faulty(service.url, lambda _: None) as proxy:
        with node.settling(is_flushed=True, account_url=proxy.url) as settling:
            time.sleep(0.5)
            assert settling.status().last_error is None
        assert sum("submit-winner" in seen for seen in proxy.seen) == 1
    (row,) = node.ledger.rows()
    assert (row.reward_state, row.vote_state) == ("confirmed", "rejected")
    assert "HTTP 400: InvalidVote" in row.vote_reason


def test_row_that_the_service_does_not_understand_holds_up_no_other(chain, node) -> None:
    advance(chain, 1)
    node.ledger.record(0, 0, node.peer_id, 5, ["no peer id"])
    node.earn(1)
    with node.settling() as settling:
        eventually(lambda: node.states()[1] == ("confirmed", "confirmed"))
        assert node.states()[0] == ("confirmed", "queued")
        assert "winners/0: got 'no peer id'" in settling.status().last_error


def test_future_round_waits_and_a_stage_that_never_was_is_rejected(chain, node) -> None:
    node.ledger.record(0, 1, node.peer_id, 1, [])
    node.earn(1, 2)
    with node.settling() as settling:
        time.sleep(0.8)
        assert node.states() == [("queued", None), ("queued", "queued"), ("queued", "queued")]
        assert settling.status().last_error is None
        advance(chain, 2)
        eventually(lambda: not node.ledger.unsettled())
    first, *others = node.ledger.rows()
    assert first.reward_state == "rejected"
    assert "InvalidStageNumber" in first.reward_reason
    assert {(row.reward_state, row.vote_state) for row in others} == {("confirmed", "confirmed")}


def test_old_round_that_a_contract_refuses_is_rejected_once(chain, node) -> None:
    """Ours takes old rounds for ever; a foreign one may not (stood in for by the account)."""
    advance(chain, 3)
    asked: list[int] = []

    class Strict(AccountClient):
        def submit_reward(self, round: int, *rest: object) -> str:
            asked.append(round)
            if round < 3:
                raise ContractRefused("InvalidRoundNumber", f"round {round} is over")
            return super().submit_reward(round, *rest)

    node.ledger.record(1, 0, node.peer_id, 5, [])
    node.ledger.record(3, 0, node.peer_id, 6, [])
    parsed = node.service.node_chain()
    settling = Settlement(node.ledger, Coordinator(parsed), Strict(parsed, node.folder), parsed)
    settling.start()
    try:
        assert settling.flush(30)
        time.sleep(0.5)
    finally:
        settling.close()
    old, new = node.ledger.rows()
    assert (old.reward_state, old.reward_reason) == ("rejected", "round 1 is over")
    assert new.reward_state == "confirmed"
    assert asked == [1, 3]


def test_reward_of_an_old_round_is_still_credited(chain, node) -> None:
    advance(chain, 5)
    node.earn(1)
    node.settle()
    node.assert_exactly_once()


def test_peer_of_another_account_stops_with_both_and_keeps_the_rows(chain, service, tmp_path, node) -> None:
    stranger = chain.new_account("QmStranger")
    token = service.service._tokens.issue("QmStranger")
    (node.folder / "account.token").write_text(token)
    node.ledger.record(0, 0, "QmStranger", 5, [])
    with node.settling() as settling:
        eventually(lambda: settling.status().last_error)
        assert f"registered by {stranger.address}" in settling.status().last_error
        assert service.service.address in settling.status().last_error
        assert not settling.flush(0.5)
    assert node.states() == [("queued", None)]


def test_wrong_token_keeps_the_rows_and_says_so(node) -> None:
    node.earn(0)
    (node.folder / "account.token").write_text("wrong")
    with node.settling() as settling:
        eventually(lambda: settling.status().last_error)
        assert "TokenWrong" in settling.status().last_error
    assert node.states() == [("queued", "queued")]
    enrol(node.identity, ENROLMENT_TOKEN, node.service.node_chain(), node.folder)
    node.settle()
    node.assert_exactly_once()


# ---- a chain that is away, or forgets


def test_unreachable_account_service_is_waited_for(chain, tmp_path, tmp_path_factory) -> None:
    parsed = account_settings(chain.settings, tmp_path / "account")
    with serving(parsed) as service:
        node = Node(chain, service, tmp_path / "node", tmp_path_factory.getbasetemp())
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
    with faulty(service.url, lambda seen: "lie" if "submit" in seen and next(lies, None) else None) as proxy:
        node.settle(account_url=proxy.url)
    node.assert_exactly_once()
    assert next(lies, None) is None
    assert node.ledger.rows()[0].reward_hash != "0x" + "11" * 32


def test_chain_that_forgot_everything_is_told_again_at_the_next_start(chain, node, snapshot) -> None:
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
    node = Node(chain, service, tmp_path / "node", tmp_path_factory.getbasetemp())
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
            account_url=account.url, rpc_url=rpc.url, contract=chain.deployment.contract, timeout_seconds=2.0
        ) as settling,
    ):
        assert settling.flush(40), (settling.status(), node.states())
    node.assert_exactly_once()


def test_backlog_gets_through_an_account_service_that_fails_now_and_then(chain, service, node) -> None:
    """Each walk gets a little further: pauses that double with every failure would take minutes."""
    advance(chain, 39)
    node.earn(*range(40))
    count = iter(range(10**6))
    fault = lambda seen: "drop" if "submit" in seen and next(count) % 8 == 7 else None  # noqa: E731
    with faulty(service.url, fault) as account:
        parsed = {"account_url": account.url, "rpc_url": (chain.deployment.rpc_url,), "poll_seconds": 0.5}
        started = time.monotonic()
        node.settle(contract=chain.deployment.contract, **parsed)
        assert time.monotonic() - started < 25
    node.assert_exactly_once()


def test_killed_while_settling_loses_and_doubles_nothing(chain, service, node) -> None:
    advance(chain, 14)
    node.earn(*range(15))
    rng = random.Random(5)
    for _ in range(2):
        settler = subprocess.Popen(
            [sys.executable, "-c", SETTLER, str(node.folder), service.url], stdout=subprocess.PIPE, text=True
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
    settling = Settlement(ledger, Coordinator(parsed), AccountClient(parsed, tmp_path), parsed)
    assert settling.status().earned == 0
    settling.close()
    settling.close()

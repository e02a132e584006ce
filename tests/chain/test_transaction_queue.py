import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from account_service import at_random, eventually, faulty
from eth_account import Account
from eth_account.signers.local import LocalAccount

from worker.chain import transaction_queue as sender_module
from worker.chain.coordinator import Coordinator
from worker.chain.queue_status import QueueState
from worker.chain.transaction_queue import Sender
from worker.errors import ChainError, ChainUnreachable, ContractRefused, WorkerError


@pytest.fixture
def account() -> LocalAccount:
    return Account.create()


@pytest.fixture
def sender(chain, account, tmp_path) -> Sender:
    return Sender(chain.coordinator, account, tmp_path / "journal.db")


def is_done(sender: Sender) -> bool:
    return sender.tend() == 0


def await_peers(chain, account, expected: Iterable[str]) -> None:
    """Wait until the contract lists exactly these peers of the account.

    anvil counts a transaction in the account's nonce a moment before `eth_call` at "latest" sees
    what it did.
    """
    wanted = sorted(expected)
    eventually(lambda: sorted(chain.peers_of(account.address)) == wanted)


def in_threads(count: int, work: Callable[[int], str]) -> list[str]:
    """The results of `count` calls that begin at the same instant."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> str:
        barrier.wait(20)
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count), timeout=60))


def test_sent_call_is_mined_and_then_forgotten(chain, account, sender) -> None:
    tx_hash = sender.send(chain.coordinator.register_peer("me"))
    assert chain.coordinator.wait_for_receipt(tx_hash, 10).succeeded
    assert chain.coordinator.owner_of("me") == account.address
    eventually(lambda: is_done(sender))
    assert sender.waiting() == []


def test_call_that_the_contract_refuses_is_refused_by_name_and_uses_no_nonce(
    chain, account, sender
) -> None:
    with pytest.raises(ContractRefused) as caught:
        sender.send(chain.coordinator.submit_reward(0, 0, 5, "nobody"))
    assert caught.value.name == "InvalidVoterPeerId"
    assert sender.waiting() == []
    assert chain.coordinator.nonce(account.address) == 0


def test_64_submitters_at_the_same_instant_lose_nothing(chain, account, sender) -> None:
    in_threads(64, lambda i: sender.send(chain.coordinator.register_peer(f"peer-{i}")))
    eventually(lambda: is_done(sender))
    await_peers(chain, account, (f"peer-{i}" for i in range(64)))
    assert chain.coordinator.nonce(account.address) == 64


def gather(sender: Sender, calls: list) -> list[str | Exception]:
    """What comes of calls that all wait while another one is being sent."""

    def send(call) -> str | Exception:
        try:
            return sender.send(call)
        except WorkerError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        with sender._lock:
            outcomes = [threads.submit(send, call) for call in calls]
            eventually(lambda: len(sender._arrived) == len(set(calls)))
        return [outcome.result(60) for outcome in outcomes]


def test_calls_that_wait_go_out_with_one_request_of_each_kind(chain, account, tmp_path) -> None:
    with faulty(chain.deployment.rpc_url, lambda _: None) as proxy:
        sender = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        sender.send(chain.coordinator.register_peer("first"))
        seen = len(proxy.seen)
        gather(sender, [chain.coordinator.register_peer(f"peer-{i}") for i in range(20)])
        assert len(proxy.seen) - seen <= 3, proxy.seen[seen:]
        eventually(lambda: is_done(sender))
    eventually(lambda: len(chain.peers_of(account.address)) == 21)
    assert chain.coordinator.nonce(account.address) == 21


def test_refused_call_among_others_is_the_only_one_refused(chain, account, sender) -> None:
    sender.send(chain.coordinator.register_peer("me"))
    eventually(lambda: is_done(sender))
    register = chain.coordinator.register_peer
    first, refused, again, last = gather(
        sender, [register("one"), register("me"), register("one"), register("two")]
    )
    assert isinstance(refused, ContractRefused)
    assert refused.name == "PeerIdAlreadyRegistered"
    assert first == again
    assert isinstance(last, str)
    eventually(lambda: is_done(sender))
    await_peers(chain, account, {"me", "one", "two"})
    assert chain.coordinator.nonce(account.address) == 3


def test_nonce_that_somebody_else_used_in_a_batch_is_stepped_over(chain, account, sender) -> None:
    sender.send(chain.coordinator.register_peer("one"))
    eventually(lambda: is_done(sender))
    chain.send(account, chain.coordinator.register_peer("two"))
    # As if that had come between our look at the nonce and the sending.
    sender._write(sender._signed(chain.coordinator.register_peer("three"), 0, 300_000, 0))
    outcomes = gather(
        sender, [chain.coordinator.register_peer(name) for name in ("three", "four", "five")]
    )
    assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
    eventually(lambda: is_done(sender))
    await_peers(chain, account, {"one", "two", "three", "four", "five"})


def test_chain_that_takes_no_batches_gets_each_alone(chain, account, tmp_path) -> None:
    with faulty(
        chain.deployment.rpc_url, lambda seen: "alone" if seen.startswith("/ [") else None
    ) as proxy:
        sender = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        gather(sender, [chain.coordinator.register_peer(f"peer-{i}") for i in range(5)])
        gather(sender, [chain.coordinator.register_peer(f"more-{i}") for i in range(5)])
        assert sum(seen.startswith("/ [") for seen in proxy.seen) == 1
        eventually(lambda: is_done(sender))
    eventually(lambda: len(chain.peers_of(account.address)) == 10)


def test_chain_that_is_away_is_waited_for_once_for_all(chain, account, tmp_path) -> None:
    is_away = False
    with faulty(chain.deployment.rpc_url, lambda _: "hang" if is_away else None) as proxy:
        sender = Sender(
            through(chain, proxy.url, timeout_seconds=1.0), account, tmp_path / "journal.db"
        )
        sender.send(chain.coordinator.register_peer("first"))
        is_away, started = True, time.monotonic()
        outcomes = gather(sender, [chain.coordinator.register_peer(f"peer-{i}") for i in range(8)])
        assert time.monotonic() - started < 6
        assert {type(outcome) for outcome in outcomes} == {ChainUnreachable}
        is_away = False
        outcomes = gather(sender, [chain.coordinator.register_peer(f"peer-{i}") for i in range(8)])
        assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
        eventually(lambda: is_done(sender))
    eventually(lambda: len(chain.peers_of(account.address)) == 9)


@pytest.mark.parametrize("kind", ["lose", "stale", "twice", "drop", "error"])
def test_batch_whose_answer_goes_wrong_is_sent_once(chain, account, tmp_path, kind) -> None:
    faults = iter([kind, None, kind])
    fault = lambda seen: next(faults, None) if seen.startswith("/ [") else None  # noqa: E731
    with faulty(chain.deployment.rpc_url, fault) as proxy:
        sender = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        for names in ("abcd", "efgh", "ijkl"):
            outcomes = gather(sender, [chain.coordinator.register_peer(name) for name in names])
            assert all(isinstance(outcome, str) for outcome in outcomes), outcomes
        eventually(lambda: is_done(sender))
    await_peers(chain, account, set("abcdefghijkl"))
    assert chain.coordinator.nonce(account.address) == 12


def test_the_same_call_at_the_same_instant_is_one_transaction(chain, account, sender) -> None:
    hashes = in_threads(8, lambda _: sender.send(chain.coordinator.register_peer("me")))
    assert len(set(hashes)) == 1
    eventually(lambda: is_done(sender))
    assert chain.coordinator.nonce(account.address) == 1


def test_nonce_used_by_somebody_else_is_stepped_over(chain, account, sender) -> None:
    sender.send(chain.coordinator.register_peer("one"))
    for name in ("two", "three"):
        chain.send(account, chain.coordinator.register_peer(name))
    tx_hash = sender.send(chain.coordinator.register_peer("four"))
    assert sender.hashes(tx_hash)[1:] == [tx_hash]  # the first one had a nonce that was used
    eventually(lambda: is_done(sender))
    await_peers(chain, account, {"one", "two", "three", "four"})


def through(chain, url: str, timeout_seconds: float = 2.0) -> Coordinator:
    changed = chain.settings.chain.model_copy(
        update={"rpc_url": url, "timeout_seconds": timeout_seconds}
    )
    return Coordinator(changed)


def test_lost_answer_is_the_same_transaction_when_sent_again(chain, account, tmp_path) -> None:
    losing = True
    fault = lambda seen: "lose" if losing and "eth_sendRawTransaction" in seen else None  # noqa: E731
    with faulty(chain.deployment.rpc_url, fault) as proxy:
        sender = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        call = chain.coordinator.register_peer("me")
        with pytest.raises(ChainUnreachable):
            sender.send(call)
        losing = False
        assert len(sender.waiting()) == 1
        tx_hash = sender.send(call)
        assert chain.coordinator.wait_for_receipt(tx_hash, 10).succeeded
        eventually(lambda: is_done(sender))
    assert chain.coordinator.nonce(account.address) == 1


def test_restart_sends_what_no_node_had_taken(chain, account, tmp_path) -> None:
    fault = lambda seen: "drop" if "eth_sendRawTransaction" in seen else None  # noqa: E731
    with faulty(chain.deployment.rpc_url, fault) as proxy:
        before = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        for name in ("one", "two"):
            with pytest.raises(ChainUnreachable):
                before.send(chain.coordinator.register_peer(name))
        before.close()
    after = Sender(chain.coordinator, account, tmp_path / "journal.db")
    assert [entry.nonce for entry in after.waiting()] == [0, 1]
    eventually(lambda: is_done(after))
    await_peers(chain, account, {"one", "two"})


def test_state_tells_what_waits_since_when_and_the_last_error(chain, account, tmp_path) -> None:
    drops = True
    fault = lambda seen: "drop" if drops and "eth_sendRawTransaction" in seen else None  # noqa: E731
    began = time.time()
    with faulty(chain.deployment.rpc_url, fault) as proxy:
        sender = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        assert sender.state() == QueueState()
        for name in ("one", "two"):
            with pytest.raises(ChainUnreachable):
                sender.send(chain.coordinator.register_peer(name))
        found = sender.state()
        assert (found.waiting, found.sent, found.failed) == (2, 0, 0)
        assert found.oldest_at is not None
        assert began - 1 < found.oldest_at < time.time() + 1
        assert (found.last_error or "").startswith("registerPeer: ")
        sender.close()
        # A restart keeps the times; what is sent again is no longer waiting.
        drops = False
        after = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        assert after.state().oldest_at == found.oldest_at
        with pytest.raises(ContractRefused):
            after.send(chain.coordinator.submit_reward(0, 0, 5, "nobody"))
        assert (after.state().failed, after.state().waiting) == (1, 2)
        assert "InvalidVoterPeerId" in (after.state().last_error or "")
        eventually(lambda: is_done(after))
    done = after.state()
    assert (done.waiting, done.sent, done.oldest_at, done.failed) == (0, 0, None, 1)


def test_states_of_several_queues_add_up() -> None:
    state = QueueState
    one, two = state(1, 2, 50.0, 1, "old", 7.0), state(3, 0, 40.0, 0, "new", 9.0)
    assert one + two + state() == state(4, 2, 40.0, 1, "new", 9.0)


def test_time_of_arrival_follows_a_transaction_to_its_new_nonce(chain, account, tmp_path) -> None:
    sender = Sender(chain.coordinator, account, tmp_path / "journal.db")
    for nonce, name in ((3, "one"), (4, "two")):
        sender._write(sender._signed(chain.coordinator.register_peer(name), nonce, 300_000, 0))
    before = sender._journal.execute("SELECT at FROM arrivals ORDER BY nonce")
    sender.tend()
    rows = sender._journal.execute("SELECT nonce, at FROM arrivals ORDER BY nonce")
    # Both are sent again, from the chain's next nonce on; one may be mined already.
    assert rows == [(nonce, at) for nonce, (at,) in enumerate(before)][-len(rows) :]
    eventually(lambda: is_done(sender))


def test_nonces_that_the_chain_forgot_are_filled(chain, account, tmp_path, monkeypatch) -> None:
    journal = tmp_path / "journal.db"
    sender = Sender(chain.coordinator, account, journal)
    # As after a chain restored from a dump: what we sent last has nonces that the chain is not at
    # yet.
    for nonce, name in ((3, "one"), (4, "two"), (6, "three")):
        sender._write(sender._signed(chain.coordinator.register_peer(name), nonce, 300_000, 0))
    sender.tend()
    eventually(lambda: is_done(sender))
    await_peers(chain, account, {"one", "two", "three"})


def test_stuck_transaction_is_sent_again_at_a_higher_price(
    chain, account, sender, monkeypatch
) -> None:
    monkeypatch.setattr(sender_module, "STUCK_SECONDS", 0.0)
    monkeypatch.setattr(chain.coordinator, "gas_price", lambda: 1000)
    sent: list[bytes] = []
    monkeypatch.setattr(chain.coordinator, "send_raw", sent.append)
    sender.send(chain.coordinator.register_peer("me"))
    for _ in range(30):
        time.sleep(0.001)
        sender.tend()
    prices = [entry.price_wei for entry in sender.waiting()]
    assert len(prices) == 1
    assert 5000 <= prices[0] <= 5000 * 1.125 + 1
    assert len(set(sent)) > 10
    assert [entry.nonce for entry in sender.waiting()] == [0]


@pytest.fixture
def idle_chain(chain):
    """No block is made until the test asks for one."""

    def rpc(method: str, *params: object) -> None:
        assert "error" not in chain.coordinator.web3.provider.make_request(method, list(params))

    rpc("evm_setAutomine", False)
    rpc("evm_setIntervalMining", 0)
    yield lambda: rpc("evm_mine")
    rpc("evm_setIntervalMining", 1)
    rpc("evm_setAutomine", True)


def test_replacement_of_a_stuck_transaction_takes_its_place_on_a_real_chain(
    chain, account, sender, idle_chain, monkeypatch
) -> None:
    monkeypatch.setattr(sender_module, "STUCK_SECONDS", 0.0)
    monkeypatch.setattr(
        chain.coordinator, "gas_price", lambda: 1000
    )  # this chain itself asks for nothing
    chain.coordinator.web3.provider.make_request("anvil_setBalance", [account.address, hex(10**18)])
    first = [sender.send(chain.coordinator.register_peer(name)) for name in ("one", "two")]
    time.sleep(0.01)
    assert sender.tend() == 2
    again = [entry.hash for entry in sender.waiting()]
    assert set(first).isdisjoint(again)
    assert [entry.nonce for entry in sender.waiting()] == [0, 1]
    for pair in zip(first, again, strict=True):
        assert [sender.hashes(tx_hash) for tx_hash in pair] == [list(pair), list(pair)]
    assert [entry.hash for entry in map(sender.pending().get, first)] == again
    idle_chain()
    assert sender.tend() == 0
    assert [chain.coordinator.receipt(tx_hash) for tx_hash in first] == [None, None]
    assert all(chain.coordinator.receipt(tx_hash).succeeded for tx_hash in again)
    assert sorted(chain.peers_of(account.address)) == ["one", "two"]


def test_transaction_that_the_chain_will_not_have_leaves_no_gap(
    chain, account, sender, monkeypatch
) -> None:
    def refuse(raw: bytes) -> None:
        raise ChainError("insufficient funds")

    with monkeypatch.context() as patched:
        patched.setattr(chain.coordinator, "send_raw", refuse)
        with pytest.raises(ChainError, match="insufficient funds"):
            sender.send(chain.coordinator.register_peer("one"))
    assert sender.waiting() == []
    sender.send(chain.coordinator.register_peer("two"))
    eventually(lambda: is_done(sender))
    await_peers(chain, account, ["two"])


def test_faulty_rpc_loses_and_doubles_nothing(chain, account, tmp_path) -> None:
    with faulty(chain.deployment.rpc_url, at_random(1, 0.2)) as proxy:
        sender = Sender(through(chain, proxy.url), account, tmp_path / "journal.db")
        open_calls = [chain.coordinator.register_peer(f"peer-{i}") for i in range(8)]
        names: set[str] = set()
        deadline = time.monotonic() + 40
        while open_calls and time.monotonic() < deadline:
            try:
                sender.tend()
                sender.send(open_calls[0])
            except ContractRefused as refused:
                names.add(refused.name)
                open_calls.pop(0)
            except ChainError:
                pass
        proxy.fault = lambda _: None
        eventually(lambda: is_done(sender))
    assert names == {"PeerIdAlreadyRegistered"}
    await_peers(chain, account, (f"peer-{i}" for i in range(8)))

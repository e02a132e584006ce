"""Every role with a chain as in public: a real anvil behind a proxy that misbehaves."""

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from account_service import ENROLMENT_TOKEN, account_settings, eventually, serving, some_identity
from conftest import Chain
from eth_account import Account
from public_rpc import ODD_ANSWERS, mine, public, reorganise
from public_swarm import (
    BEFORE,
    client_through,
    keeping,
    public_forgetful,
    public_old_chain,
    public_swarm,
    through,
)

from worker.chain import settlement
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.keeper import Keeper
from worker.chain.ledger import Ledger
from worker.chain.registration import enrol
from worker.chain.settlement import Settlement
from worker.chain.transaction_queue import Sender
from worker.commands import audit
from worker.dashboard.reader import Reader
from worker.errors import BadAnswer, ChainUnreachable
from worker.rounds import ChainClock

__all__ = ["public_forgetful", "public_old_chain", "public_swarm"]  # fixtures


# ---- the keeper


# A few kinds in every run, all of them in nightly ones.
SOME_ODD = [
    odd if odd in ("html", "missing-node", "null") else pytest.param(odd, marks=pytest.mark.nightly)
    for odd in ODD_ANSWERS
]


@pytest.mark.parametrize("odd", SOME_ODD)
def test_no_answer_of_a_chain_ends_the_keeper(swarm, old_chain, odd):
    """Useless answers to everything for a while, then occasionally, at each of its calls."""
    account = swarm.new_account("c")
    is_odd = {"all": True}
    with public(old_chain, odd=odd, range_limit=10) as proxy:
        proxy.is_odd = lambda method, number: is_odd["all"] or number % 23 == 0
        with keeping(through(swarm, proxy.url, timeout_seconds=3.0)):
            eventually(lambda: proxy.injected[odd] >= 3, 20)
            swarm.send(account, swarm.coordinator.submit_reward(2, 0, 1, "c"))
            is_odd["all"] = False
            # Two peers are expected that do not come, so only a chain that is read shows in the
            # status.
            status = swarm.settings.keeper.state_dir / "status.json"
            eventually(lambda: json.loads(status.read_text()).get("reporters") == 1, 40)


def test_keeper_ends_a_round_through_a_limited_and_throttled_address(swarm, old_chain):
    account = swarm.new_account("c")
    swarm.send(account, swarm.coordinator.submit_reward(2, 0, 1, "c"))
    keeper = swarm.settings.keeper.model_copy(update={"ready_fraction": 0.1, "min_peers": 1})
    with public(old_chain, range_limit=8, throttle_after=60, retry_after=0.3) as proxy:
        of = through(swarm, proxy.url).model_copy(
            update={"keeper": keeper.model_copy(update={"round_seconds": 1.0})}
        )
        with keeping(of):
            eventually(lambda: swarm.coordinator.current_round() >= 3, 40)
        assert proxy.early == 0
        assert max(proxy.ranges()[10:]) <= 8


def test_report_in_blocks_that_were_replaced_is_not_counted(swarm, old_chain):
    account = swarm.new_account("c")
    mine(old_chain, 3)
    keeper = Keeper(through(swarm, old_chain))
    keeper.look()
    swarm.send(account, swarm.coordinator.submit_reward(2, 0, 1, "c"))
    mine(old_chain, 2)
    keeper.look()
    assert keeper._round.reports[2] == {"c"}
    reorganise(old_chain, 3)
    assert swarm.coordinator.submitted_reward(2, 0, "c") is None
    keeper.look()
    assert keeper._round.reports[2] == set()
    swarm.send(account, swarm.coordinator.submit_reward(2, 0, 2, "c"))
    keeper.look()
    assert keeper._round.reports[2] == {"c"}


# ---- rewards: ledger, settlement, account service


@contextmanager
def settling(
    swarm: Chain, tmp_path: Path, service_rpc: str, node_rpc: str
) -> Iterator[tuple[Settlement, Ledger, str]]:
    """Run an enrolled node that settles, and an account service, with addresses of their own."""
    served = account_settings(through(swarm, service_rpc), tmp_path / "account")
    with serving(served) as service:
        node = some_identity(tmp_path)
        direct = through(swarm, node_rpc, account_url=service.url).chain
        enrol(node, ENROLMENT_TOKEN, direct, tmp_path / "node")
        ledger = Ledger(tmp_path / "node/ledger.db")
        account = AccountClient(direct, tmp_path / "node")
        settled = Settlement(ledger, Coordinator(direct), account, direct)
        settled.start()
        try:
            yield settled, ledger, node.peer_id
        finally:
            settled.close()


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("worker.chain.transaction_queue.STUCK_SECONDS", 1.0)
    monkeypatch.setattr(settlement, "RESEND_SECONDS", 2.0)
    monkeypatch.setattr(settlement, "RECHECK_SECONDS", 0.5)
    monkeypatch.setattr(settlement, "LAST_RECHECK_SECONDS", 2.0)
    monkeypatch.setattr(settlement, "_MAX_BACKOFF_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_rewards_are_settled_once_through_odd_and_throttled_addresses(swarm, old_chain, tmp_path):
    kinds = list(ODD_ANSWERS)
    with (
        public(old_chain) as service_rpc,
        public(old_chain, throttle_after=40, retry_after=0.2) as node_rpc,
    ):

        def now_and_then(method: str, number: int) -> bool:
            service_rpc.odd = node_rpc.odd = kinds[number % len(kinds)]
            return number % 5 == 0

        with settling(swarm, tmp_path, service_rpc.url, node_rpc.url) as (settled, ledger, peer_id):
            service_rpc.is_odd = node_rpc.is_odd = now_and_then
            service_rpc.odd = node_rpc.odd = "html"
            for round in range(3):
                ledger.record(round, 0, peer_id, 50 + round, ["a"])
            settled.wake()
            assert settled.flush(60), (settled.status(), ledger.unsettled())
        assert node_rpc.early == 0
        assert sum(service_rpc.injected.values()) > 3
    assert [row.reward_state for row in ledger.rows()] == ["confirmed"] * 3
    assert swarm.coordinator.total_rewards([peer_id]) == [50 + 51 + 52]


@pytest.mark.usefixtures("impatient")
def test_reward_in_blocks_that_were_replaced_is_sent_again(swarm, old_chain, tmp_path):
    with settling(swarm, tmp_path, old_chain, old_chain) as (settled, ledger, peer_id):
        mine(old_chain, 3)
        ledger.record(2, 0, peer_id, 77, ["a"])
        settled.wake()
        assert settled.flush(30)
        time.sleep(0.7)  # the first look back has passed
        reorganise(old_chain, 3)
        assert swarm.coordinator.submitted_reward(2, 0, peer_id) is None
        eventually(lambda: swarm.coordinator.submitted_reward(2, 0, peer_id) == 77, 30)
        eventually(lambda: ledger.rows()[0].reward_state == "confirmed", 30)


def test_sender_goes_on_after_its_nonces_were_taken_back(swarm, old_chain, tmp_path, monkeypatch):
    monkeypatch.setattr("worker.chain.transaction_queue.STUCK_SECONDS", 0.3)
    account = Account.create()
    mine(old_chain, 3)
    with closing(Sender(swarm.coordinator, account, tmp_path / "journal.db")) as sender:
        for peer in ("x", "y", "z"):
            sender.send(swarm.coordinator.register_peer(peer))
        reorganise(old_chain, 3)
        assert swarm.coordinator.nonce(account.address) == 0
        for peer in ("x", "y", "z"):
            sender.send(swarm.coordinator.register_peer(peer))
        eventually(lambda: sender.tend() == 0, 20)
    eventually(lambda: set(swarm.peers_of(account.address)) == {"x", "y", "z"})


def test_account_service_lets_an_address_rest_that_throttles_its_nodes(swarm, old_chain, tmp_path):
    node = some_identity(tmp_path)
    with public(old_chain) as proxy:
        served = account_settings(through(swarm, proxy.url), tmp_path / "account")
        with serving(served) as service:
            service.enrolled(node, tmp_path / "node")
            token = tmp_path / "node/account.token"
            client = Coordinator(service.node_chain(account_token_file=token))
            assert client.current_round() == 2
            proxy.throttle_after, proxy.retry_after = 0, 1.0
            for _ in range(3):
                with pytest.raises(ChainUnreachable):
                    client.current_round()
            proxy.throttle_after = None
            eventually(lambda: is_read(client), 20)
        assert proxy.injected["429"] >= 1
        assert proxy.early == 0


def is_read(client: Coordinator) -> bool:
    try:
        return client.current_round() == 2
    except ChainUnreachable:
        return False


def test_enrolment_waits_for_a_chain_that_answers_oddly(swarm, old_chain, tmp_path):
    served = account_settings(through(swarm, old_chain), tmp_path / "account")
    node = some_identity(tmp_path)
    with serving(served) as service, public(old_chain) as proxy:
        # The version and the binding of the peer are read before it is registered.
        proxy.is_odd = lambda method, number: (
            method == "eth_call" and 3 <= proxy.methods()[method] <= 7
        )
        proxy.odd = "no-header"
        chain = through(swarm, proxy.url, account_url=service.url).chain
        account = enrol(node, ENROLMENT_TOKEN, chain, tmp_path / "node")
        assert proxy.injected["no-header"] > 0
    assert swarm.coordinator.owner_of(node.peer_id) == account


# ---- who only reads: worker, audits, dashboard


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_worker_s_clock_takes_an_odd_answer_for_an_outage(swarm, old_chain, odd):
    with public(old_chain, odd=odd) as proxy:
        client = client_through(swarm, proxy.url, timeout_seconds=1.0)
        clock = ChainClock(client, 0.05)
        assert clock.next(0, lambda: None) is None
        assert clock.reachable is False
        with pytest.raises(ChainUnreachable):
            client.bootnodes()
        proxy.odd = None
        time.sleep(1.1 if odd == "limit" else 0)
        assert clock.next(0, lambda: None).round == 2


def test_audit_finds_every_reward_through_a_limited_address(swarm, old_chain):
    with public(old_chain, range_limit=8, dialect="results") as proxy:
        found = audit.submitted_rewards(client_through(swarm, proxy.url), 16)
    assert [(event.arguments["roundNumber"], event.arguments["peerId"]) for event in found] == [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (1, "b"),
    ]


def content_of(reader: Reader) -> dict:
    content = reader.content()
    assert content["error"] is None, content["error"]
    return {key: content[key] for key in ("round", "rounds", "peers", "num_peers")}


def test_dashboard_shows_the_same_through_a_limited_and_throttled_address(swarm, old_chain):
    direct = Reader(through(swarm, old_chain))
    assert direct.look()
    with public(
        old_chain, range_limit=9, dialect="free-tier", throttle_after=25, retry_after=0.2
    ) as proxy:
        limited = Reader(through(swarm, proxy.url))
        assert limited.look(), limited.content()["error"]
        assert proxy.early == 0
        starts = [
            int(params[0]["fromBlock"], 16)
            for method, params in proxy.asked
            if method == "eth_getLogs"
        ]
        assert min(starts) >= BEFORE
    assert content_of(limited) == content_of(direct)
    assert [peer["total_reward"] for peer in content_of(direct)["peers"]] == [300, 300]


@pytest.mark.parametrize("odd", SOME_ODD)
def test_dashboard_keeps_what_it_knows_while_answers_are_odd(swarm, old_chain, odd):
    with public(old_chain) as proxy:
        reader = Reader(through(swarm, proxy.url, timeout_seconds=1.0))
        assert reader.look()
        before = content_of(reader)
        proxy.odd = odd
        assert not reader.look()
        assert {key: reader.content()[key] for key in before} == before
        proxy.odd = None
        time.sleep(1.1 if odd == "limit" else 0)
        assert reader.look()
        assert content_of(reader) == before


def test_dashboard_forgets_what_was_in_replaced_blocks(swarm, old_chain):
    account = swarm.new_account("c")
    mine(old_chain, 3)
    reader = Reader(through(swarm, old_chain))
    assert reader.look()
    before = content_of(reader)
    swarm.send(account, swarm.coordinator.submit_reward(2, 0, 999, "c"))
    mine(old_chain, 2)
    assert reader.look()
    assert content_of(reader)["rounds"][-1] == {"round": 2, "mean_reward": 999.0, "num_peers": 1}
    reorganise(old_chain, 3)
    assert reader.look()
    assert content_of(reader) == before


# ---- two addresses that disagree


def test_log_is_not_cut_by_an_address_that_is_behind(swarm, old_chain):
    account = swarm.new_account("c")
    swarm.send(account, swarm.coordinator.submit_reward(2, 0, 5, "c"))
    mine(old_chain, 1)
    newest = swarm.coordinator.block_number()
    with public(old_chain) as good, public(old_chain, behind=4) as late:
        client = client_through(swarm, good.url, late.url)
        client.check()
        good.odd = "bad-gateway"  # from now on the other one serves
        with pytest.raises(BadAnswer, match=rf"has no block {newest} yet; it is behind"):
            list(client.events("RewardSubmitted", to_block=newest))
        late.behind = 0
        assert len(list(client.events("RewardSubmitted", to_block=newest))) == 5


def test_dashboard_and_keeper_end_with_the_truth_of_two_addresses(swarm, old_chain):
    account = swarm.new_account("c")
    with public(old_chain) as good, public(old_chain, behind=3) as late:
        of = through(swarm, good.url, late.url)
        reader, keeper = Reader(of), Keeper(of)
        reader.look()
        keeper.look()
        swarm.send(account, swarm.coordinator.submit_reward(2, 0, 5, "c"))
        good.odd = "bad-gateway"
        for look in (reader.look, keeper.look):
            try:
                look()
            except ChainUnreachable:
                continue
        good.odd, late.odd = None, "bad-gateway"
        reader.look()
        assert reader.look()
        keeper.look()
        assert keeper._round.reports[2] == {"c"}
        assert content_of(reader)["rounds"][-1] == {"round": 2, "mean_reward": 5.0, "num_peers": 1}

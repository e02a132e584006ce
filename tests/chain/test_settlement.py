"""Settlement of a ledger: the fate of rewards and votes, by the chain's state and refusals."""

import time

from account_service import ENROLMENT_TOKEN, eventually, faulty
from settling import advance, impatience, settling_node, settling_service  # noqa: F401 - fixtures

from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.registration import enrol
from worker.chain.settlement import Settlement
from worker.errors import ContractRefused

# ---- when all goes well


def test_rewards_and_votes_are_confirmed_with_hash_and_block(chain, node) -> None:
    advance(chain, 2)
    node.earn(0, 1, 2)
    with node.settling() as settling:
        eventually(lambda: settling.status().confirmed == 3 and not node.ledger.unsettled())
        status = settling.status()
    node.assert_exactly_once()
    assert (status.earned, status.sent, status.confirmed, status.rejected, status.last_error) == (
        3,
        0,
        3,
        0,
        None,
    )
    for row in node.ledger.rows():
        for tx_hash, block in (
            (row.reward_hash, row.reward_block),
            (row.vote_hash, row.vote_block),
        ):
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
    assert all(
        row.reward_sent_at - node.ledger.rows()[0].earned_at >= 1.2 for row in node.ledger.rows()
    )


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
    while not chain.coordinator.votes(0, node.peer_id) and time.monotonic() < deadline:
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
    cause = (
        "the chain's stands; most likely another process uses this node's identity: stop one of"
        " them"
    )
    assert row.reward_reason == f"the chain holds 7, this ledger 100; {cause}"
    assert row.vote_reason == f"the chain holds ['v'], this ledger ['w']; {cause}"


def test_one_mixed_up_answer_rejects_nothing(node, monkeypatch) -> None:
    node.earn(0)
    truth, lies = Coordinator.submitted_reward, iter([7])
    monkeypatch.setattr(
        Coordinator, "submitted_reward", lambda *place: next(lies, None) or truth(*place)
    )
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
    """Our contract accepts old rounds forever; a foreign one, simulated here, may not."""
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
    settling = Settlement(
        node.ledger, node.coordinator(parsed), Strict(parsed, node.folder), parsed
    )
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


def test_peer_of_another_account_stops_with_both_and_keeps_the_rows(
    chain, service, tmp_path, node
) -> None:
    outsider = chain.new_account("QmStranger")
    token = service.service.accounts._operator_tokens.issue("QmStranger")
    (node.folder / "account.token").write_text(token)
    node.ledger.record(0, 0, "QmStranger", 5, [])
    with node.settling() as settling:
        eventually(lambda: settling.status().last_error)
        assert f"registered by {outsider.address}" in settling.status().last_error
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


def test_node_of_the_version_before_waits_for_its_upgrade_and_loses_nothing(node) -> None:
    """An upgraded coordinator's /rpc refuses nodes without a token; their rewards wait."""
    parsed = node.service.node_chain()
    node.earn(0)
    before = Settlement(
        node.ledger, Coordinator(parsed), AccountClient(parsed, node.folder), parsed
    )
    before.start()
    eventually(lambda: "HTTP 401" in (before.status().last_error or ""))
    before.close()
    assert [row.reward_state for row in node.ledger.rows()] != ["rejected"]
    node.settle()
    node.assert_exactly_once()

"""Bodies of the account service's calls: what is valid, and what a caller is told otherwise."""

import json
from typing import Any

import pytest

from worker.account.request_bodies import (
    Enrol,
    Refused,
    Registration,
    RpcRequest,
    SubmitReward,
    SubmitWinner,
    parse,
    parse_rpc,
)

PEER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
REWARD = {"orgId": "org", "peerId": PEER, "roundNumber": 7, "stageNumber": 1, "reward": 500}
CALL = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}


def refusal(model: Any, body: object) -> str:
    with pytest.raises(Refused) as caught:
        parse(model, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    assert "\n" not in caught.value.error
    return caught.value.error


def test_reward_is_read_and_unknown_fields_are_ignored() -> None:
    digest = "0123456789abcdef" * 4
    body = json.dumps({**REWARD, "groupsDigest": digest, "colour": "red"}).encode()
    read = parse(SubmitReward, body)
    assert (read.peer_id, read.round_number, read.reward) == (PEER, 7, 500)
    assert read.groups_digest == digest
    assert parse(SubmitReward, json.dumps(REWARD).encode()).groups_digest is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"roundNumber": -1}, "roundNumber: got -1; expected greater than or equal to 0"),
        ({"roundNumber": 2**63}, "roundNumber: got 9223372036854775808; expected less than"),
        ({"roundNumber": "7"}, "roundNumber: got '7'; expected a valid integer"),
        ({"roundNumber": 7.5}, "roundNumber: got 7.5; expected a valid integer"),
        ({"roundNumber": True}, "roundNumber: got True; expected a valid integer"),
        ({"reward": 2**127}, "reward: got 170141183460469231731687303715884105728; expected"),
        ({"reward": None}, "reward: got None; expected a valid integer"),
        ({"peerId": "not a peer"}, "peerId: got 'not a peer'; expected String should match"),
        ({"peerId": f"{PEER}\n"}, "peerId: got "),
        ({"orgId": "x" * 257}, "orgId: got 'xxxx"),
        ({"groupsDigest": "0" * 63}, "groupsDigest: got '000"),
        ({"groupsDigest": "A" * 64}, "groupsDigest: got 'AAA"),
    ],
)
def test_field_that_is_invalid_is_named_with_its_value(change: dict[str, Any], told: str) -> None:
    assert refusal(SubmitReward, REWARD | change).startswith(told)


@pytest.mark.parametrize("name", REWARD)
def test_field_that_is_missing_is_named(name: str) -> None:
    assert refusal(SubmitReward, {k: v for k, v in REWARD.items() if k != name}) == (
        f"{name}: missing"
    )


def test_long_value_is_cut_and_control_characters_are_escaped() -> None:
    told = refusal(SubmitReward, REWARD | {"peerId": "\x1b[2J" + "x" * 10_000})
    assert "\x1b" not in told
    assert len(told) < 300


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"null", b"[]", b'"text"', b"NaN"])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert refusal(SubmitReward, body).startswith("body: ")


def test_reward_in_the_contract_s_whole_range_is_valid() -> None:
    for reward in (-(2**127), 2**127 - 1):
        assert parse(SubmitReward, json.dumps(REWARD | {"reward": reward}).encode())


def test_winners_are_peers_and_limited() -> None:
    body = {"orgId": "org", "peerId": PEER, "roundNumber": 7, "winners": [PEER] * 64}
    assert parse(SubmitWinner, json.dumps(body).encode()).winners == [PEER] * 64
    assert refusal(SubmitWinner, body | {"winners": [PEER] * 65}).startswith("winners: got ")
    assert refusal(SubmitWinner, body | {"winners": [PEER, "?"]}).startswith("winners/1: got '?'")


def test_registration_may_have_a_proof() -> None:
    body: dict[str, Any] = {"orgId": "org", "peerId": PEER}
    assert parse(Registration, json.dumps(body).encode()).proof is None
    proof = {"publicKey": "a", "signature": "b", "isMove": True}
    read = parse(Registration, json.dumps(body | {"proof": proof}).encode())
    assert read.proof is not None
    assert read.proof.is_move
    assert refusal(Registration, body | {"proof": {"publicKey": "a"}}) == "proof/signature: missing"


def test_enrolment_is_limited_in_length() -> None:
    body = {"peerId": PEER, "publicKey": "a", "signature": "b", "token": "c"}
    assert parse(Enrol, json.dumps(body).encode()).token == "c"
    for name, most in (("publicKey", 4096), ("signature", 4096), ("token", 1024)):
        assert refusal(Enrol, body | {name: "x" * (most + 1)}).startswith(f"{name}: got ")


def test_one_call_or_a_batch_of_calls() -> None:
    one = parse_rpc(json.dumps(CALL).encode(), most=2)
    assert isinstance(one, RpcRequest)
    assert (one.id, one.method, one.params) == (1, "eth_chainId", [])
    batch = parse_rpc(b"  " + json.dumps([CALL, CALL | {"id": "b"}]).encode(), most=2)
    assert isinstance(batch, list)
    assert [call.id for call in batch] == [1, "b"]


@pytest.mark.parametrize("count", [0, 3])
def test_batch_of_another_size_is_refused(count: int) -> None:
    with pytest.raises(Refused, match=f"got a batch of {count}; expected 1 to 2 requests"):
        parse_rpc(json.dumps([CALL] * count).encode(), most=2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"jsonrpc": "1.0"}, "jsonrpc: got '1.0'; expected '2.0'"),
        ({"method": "x" * 65}, "method: got 'xxxx"),
        ({"method": 7}, "method: got 7"),
        ({"id": 1.5}, "id/int: got 1.5"),
        ({"params": "none"}, "params/"),
    ],
)
def test_call_that_is_no_json_rpc_is_refused(change: dict[str, Any], told: str) -> None:
    assert refusal(RpcRequest, CALL | change).startswith(told)
    assert refusal(RpcRequest, {k: v for k, v in CALL.items() if k != "jsonrpc"}) == (
        "jsonrpc: missing"
    )

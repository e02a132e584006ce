"""Proofs of a node's key: good once, for what they were made, and at the service that asked."""

import base64
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import requests
from account_service import some_identity

from tests.account.people import ADA
from worker.account import invitations, key_proofs
from worker.account.key_proofs import KeyProofs
from worker.account.request_bodies import Refused
from worker.chain import enrolment_proof
from worker.chain.enrolment_proof import Challenge, challenge_in, message
from worker.errors import ChainError
from worker.swarm.identity import Identity

CONTRACT = "0x" + "ab" * 20
PURPOSE = enrolment_proof.purpose_of_enrolment("let me in")


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return some_identity(tmp_path_factory.getbasetemp())


def proofs(chain_id: int = 7, contract: str = CONTRACT) -> KeyProofs:
    deployment = SimpleNamespace(chain_id=chain_id, contract=contract)
    return KeyProofs(SimpleNamespace(deployment=deployment))  # type: ignore[arg-type]


def show(
    to: KeyProofs,
    node: Identity,
    text: str,
    purpose: str = PURPOSE,
    signed: Challenge | None = None,
) -> str:
    """Return the error that the service gives to a signature; "": none."""
    challenge = signed or Challenge(text, 7, CONTRACT)
    signature = node.sign(message(node.peer_id, PURPOSE, challenge))
    try:
        to.require(node.peer_id, node.public_key, signature, purpose, text)
    except Refused as refused:
        return f"{refused.status} {refused.error}"
    return ""


def test_proof_is_good_once(node: Identity) -> None:
    ours = proofs()
    first, second = ours.challenge(), ours.challenge()
    assert [show(ours, node, text) for text in (first, second, first)] == [
        "",
        "",
        "403 ChallengeOver",
    ]


def test_proof_is_good_for_two_minutes_and_then_forgotten(
    node: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(key_proofs, "time", SimpleNamespace(time=lambda: now))
    ours = proofs()
    early, late = ours.challenge(), ours.challenge()
    now += 119
    assert show(ours, node, early) == ""
    now += 1
    assert show(ours, node, late) == "403 ChallengeOver"
    assert show(ours, node, early) == "403 ChallengeOver"
    assert show(ours, node, ours.challenge()) == ""
    assert len(ours._used) == 1


def test_proof_is_good_at_the_service_that_asked_and_for_what_it_was_made(node: Identity) -> None:
    ours, text = proofs(), proofs().challenge()
    assert show(ours, node, text) == "403 ChallengeOver"  # of another service, or before a restart
    for forged in ("", "1.x.y", "9" * 30, text.replace(".", "0.", 1)):
        assert show(ours, node, forged) == "403 ChallengeOver"
    text = ours.challenge()
    for other in (Challenge(text, 8, CONTRACT), Challenge(text, 7, "0x" + "cd" * 20)):
        assert show(ours, node, text, signed=other) == "403 SignatureWrong"
    assert show(ours, node, text, purpose="login") == "403 SignatureWrong"
    assert show(ours, node, text) == ""


@pytest.mark.parametrize(
    "answer",
    [
        {"challenge": "x"},
        {"challenge": 5, "chain_id": 7, "contract": CONTRACT},
        {"challenge": "", "chain_id": 7, "contract": CONTRACT},
        {"challenge": "x" * 201, "chain_id": 7, "contract": CONTRACT},
        {"challenge": "x", "chain_id": -1, "contract": CONTRACT},
        {"challenge": "x", "chain_id": 7, "contract": "no address"},
        {"challenge": "x", "chain_id": None, "contract": CONTRACT},
    ],
)
def test_odd_challenge_is_refused_by_the_node(answer: dict[str, object]) -> None:
    with pytest.raises(ChainError, match="no challenge with chain and contract"):
        challenge_in(answer, "http://here")
    assert challenge_in({}, "http://here") is None


# ---- at the service


@pytest.fixture
def enrol(service) -> Callable[..., tuple[int, str]]:
    """Return status and token, or error, of an enrolment with this body."""

    def post(body: dict[str, str]) -> tuple[int, str]:
        answer = requests.post(f"{service.url}/api/enrol", json=body, timeout=20)
        return answer.status_code, answer.json().get("token") or answer.json()["error"]

    return post


def test_enrolment_that_somebody_saw_can_not_be_sent_again(service, node, enrol) -> None:
    """Its sender would get a token, and the node's own would end. The node itself enrols again."""
    accounts = service.service.accounts
    ada = accounts.create(ADA, 3)
    secret = invitations.create(accounts.database, 1, 1e12, ada)
    seen = service.enrol_body(node, secret)
    status, token = enrol(seen)
    assert status == 200
    assert enrol(seen) == (403, "ChallengeOver")
    stolen = invitations.create(accounts.database, 1, 1e12, accounts.create("eve@example.org", 1))
    assert enrol(service.enrol_body(node, secret) | {"token": stolen}) == (403, "SignatureWrong")
    assert accounts.caller(token) == (node.peer_id, ada)
    # Its answer was lost on the way, or its token is.
    status, again = enrol(service.enrol_body(node, secret))
    assert status == 200
    assert accounts.caller(again) == (node.peer_id, ada)


def test_proof_of_the_release_before_gets_the_fleets_unchanged_token_only(
    service, node, enrol
) -> None:
    accounts = service.service.accounts
    ada = accounts.create(ADA, 3)
    new = service.enrol_body(node)
    signature = node.sign(message(node.peer_id, "", None))
    old = {key: new[key] for key in ("peerId", "publicKey", "token")}
    old["signature"] = base64.b64encode(signature).decode()
    expected = (200, service.token_of(node.peer_id))
    assert [enrol(old) for _ in range(2)] == [expected, expected]
    secret = invitations.create(accounts.database, 1, 1e12, ada)
    assert enrol(old | {"token": secret}) == (403, "ProofOld")
    accounts.revoke(accounts.operator, node.peer_id)
    assert enrol(old) == (403, "ProofOld")
    accounts.unlink(accounts.operator, node.peer_id)
    assert enrol(old) == (403, "ProofOld")
    accounts.link(ada, node.peer_id)
    assert enrol(old) == (403, "ProofOld")
    assert [each.peer_id for each in accounts.nodes_of(ada)] == [node.peer_id]

"""Moving a node to another account needs both."""

import time

import pytest
import requests
from account_service import ENROLMENT_TOKEN, eventually, some_identity
from eth_account.messages import encode_defunct

from tests.account.people import ADA, BOB, code_of, signed_in
from tests.account.visitor import texts
from worker.account import invitations, releases, sessions
from worker.chain import peer_proof
from worker.chain.account_client import AccountClient
from worker.chain.registration import enrol
from worker.errors import IdentityError


@pytest.fixture
def people(service):
    """Return ada and bob, signed in."""
    found = []
    for email in (ADA, BOB):
        visitor = signed_in(service, email)
        visitor.account = service.service.accounts.by_email(email)
        found.append(visitor)
    return found


@pytest.fixture
def node(tmp_path_factory):
    return some_identity(tmp_path_factory.getbasetemp())


@pytest.fixture
def client(chain, service, people, node, tmp_path) -> AccountClient:
    """Return the node's client; it has earned 7 for ada."""
    ada, _ = people
    secret = invitations.create(service.service.accounts.database, 9, time.time() + 60, ada.account)
    section = service.node_chain()
    assert enrol(node, secret, section, tmp_path / "node") == ada.account.address
    client = AccountClient(section, tmp_path / "node")
    client.submit_reward(0, 0, 7, node.peer_id)
    eventually(lambda: chain.coordinator.total_rewards([node.peer_id]) == [7])
    return client


def owner_of(chain, node) -> str:
    return peer_proof.binding(chain.coordinator, node.peer_id).account


def test_holder_releases_the_node_and_the_other_takes_it_with_its_rewards(
    chain, service, people, node, client, tmp_path
) -> None:
    ada, bob = people
    ada.submit("/nodes/release", peer=node.peer_id, to=bob.account.address.lower())
    assert "which may take it at its page until" in texts(ada.get("/"))
    page = texts(bob.get("/"))
    assert node.peer_id in page
    assert f"from {ada.account.address}" in page
    assert "hivewright login on its machine" in page
    assert owner_of(chain, node) == ada.account.address
    bob.submit("/nodes/take", peer=node.peer_id)
    eventually(lambda: owner_of(chain, node) == bob.account.address)
    assert chain.coordinator.total_rewards([node.peer_id]) == [7]
    assert "No node is linked yet" in texts(ada.get("/"))
    page = texts(bob.get("/"))
    assert node.peer_id in page
    assert "revoked" in page
    assert "rebindPeer" in texts(bob.get("/transactions"))
    # The token of the other account is over; the node signs in to the new one.
    with pytest.raises(IdentityError, match="TokenWrong"):
        client.submit_winner(0, [node.peer_id], node.peer_id)
    secret = invitations.create(service.service.accounts.database, 9, time.time() + 60, bob.account)
    section = service.node_chain()
    assert enrol(node, secret, section, tmp_path / "node") == bob.account.address
    AccountClient(section, tmp_path / "node").submit_winner(0, [node.peer_id], node.peer_id)
    eventually(lambda: chain.coordinator.votes(0, node.peer_id) == [node.peer_id])


def test_move_is_done_once_and_by_the_account_that_was_named(
    chain, service, people, node, client
) -> None:
    ada, bob = people
    eve = signed_in(service, "eve@example.org")
    assert (
        bob.submit("/nodes/release", peer=node.peer_id, to=bob.account.address).status_code == 404
    )
    assert bob.submit("/nodes/take", peer=node.peer_id).status_code == 404
    assert ada.submit("/nodes/release", peer=node.peer_id, to="0x" + "1" * 40).status_code == 404
    assert (
        ada.submit("/nodes/release", peer=node.peer_id, to=ada.account.address).status_code == 400
    )
    ada.submit("/nodes/release", peer=node.peer_id, to=bob.account.address)
    assert eve.submit("/nodes/take", peer=node.peer_id).status_code == 404
    eve.submit("/nodes/keep", peer=node.peer_id)  # is not eve's to refuse
    assert node.peer_id in texts(bob.get("/"))
    bob.submit("/nodes/take", peer=node.peer_id)
    eventually(lambda: owner_of(chain, node) == bob.account.address)
    bob.submit("/nodes/release", peer=node.peer_id, to=ada.account.address)
    ada.submit("/nodes/take", peer=node.peer_id)
    eventually(lambda: owner_of(chain, node) == ada.account.address)
    assert bob.submit("/nodes/take", peer=node.peer_id).status_code == 404


@pytest.mark.parametrize("by", [0, 1])
def test_release_is_taken_back_or_refused(chain, people, node, client, by) -> None:
    ada, bob = people
    ada.submit("/nodes/release", peer=node.peer_id, to=bob.account.address)
    people[by].submit("/nodes/keep", peer=node.peer_id)
    assert bob.submit("/nodes/take", peer=node.peer_id).status_code == 404
    assert owner_of(chain, node) == ada.account.address


def test_release_needs_a_fresh_sign_in_and_ends(people, node, client, monkeypatch) -> None:
    ada, bob = people
    csrf, now = ada.csrf("/"), time.time()
    with monkeypatch.context() as later:
        later.setattr(sessions.time, "time", lambda: now + sessions.FRESH_SECONDS + 1)
        answer = ada.post("/nodes/release", csrf=csrf, peer=node.peer_id, to=bob.account.address)
        assert answer.status_code == 403
    ada.submit("/nodes/release", peer=node.peer_id, to=bob.account.address)
    monkeypatch.setattr(sessions.time, "time", lambda: now + releases.RELEASE_SECONDS + 60)
    assert bob.submit("/nodes/take", peer=node.peer_id).status_code == 404


def test_account_that_is_full_or_suspended_takes_nothing(service, people, node, client) -> None:
    ada, bob = people
    accounts = service.service.accounts
    ada.submit("/nodes/release", peer=node.peer_id, to=bob.account.address)
    accounts.set_suspended(bob.account.id, True)
    assert bob.submit("/nodes/take", peer=node.peer_id).status_code == 403
    accounts.set_suspended(bob.account.id, False)
    accounts.set_max_nodes(bob.account.id, 1)
    accounts.link(accounts.by_id(bob.account.id), "QmBob1")
    answer = bob.submit("/nodes/take", peer=node.peer_id)
    assert (answer.status_code, "as many as it may" in texts(answer)) == (403, True)


def signed(service, chain, account, peer_id: str, to: str) -> str:
    """Sign a move as somebody does who exported the account's key."""
    moves = peer_proof.binding(chain.coordinator, peer_id).moves
    message = peer_proof.message_of_move(peer_id, chain.deployment, to, moves)
    key = service.service.accounts.key_of(account)
    return bytes(key.sign_message(encode_defunct(message)).signature).hex()


def call(service, path: str, **body: str) -> tuple[int, dict]:
    answer = requests.post(f"{service.url}/api/{path}", json=body, timeout=20)
    return answer.status_code, answer.json()


def test_both_sign_with_their_exported_keys(chain, service, people, node, client) -> None:
    ada, bob = (each.account for each in people)
    named = {"peerId": node.peer_id, "to": bob.address}
    of_ada, of_bob = (
        signed(service, chain, each, node.peer_id, bob.address) for each in (ada, bob)
    )
    assert call(service, "take-peer", **named, signature=of_bob)[1]["error"] == "NotReleased"
    assert call(service, "release-peer", **named, signature=of_bob)[1]["error"] == "SignatureWrong"
    assert call(service, "release-peer", **named, signature=of_ada)[0] == 200
    assert call(service, "take-peer", **named, signature=of_ada)[1]["error"] == "SignatureWrong"
    assert call(service, "take-peer", **named, signature="00" * 65)[1]["error"] == "SignatureWrong"
    assert call(service, "take-peer", **named, signature=of_bob)[0] == 200
    eventually(lambda: owner_of(chain, node) == bob.address)
    # Once more, after it has moved back: the signatures were for that move only.
    people[1].submit("/nodes/release", peer=node.peer_id, to=ada.address)
    people[0].submit("/nodes/take", peer=node.peer_id)
    eventually(lambda: owner_of(chain, node) == ada.address)
    assert call(service, "release-peer", **named, signature=of_ada)[1]["error"] == "SignatureWrong"


def test_unlinked_node_of_the_fleet_does_not_come_back_with_its_old_token(
    service, people, node, tmp_path
) -> None:
    """Its HMAC is the same at each issue; a new token of the fleet is another."""
    accounts = service.service.accounts
    section = service.node_chain()
    address = enrol(node, ENROLMENT_TOKEN, section, tmp_path / "node")
    client = AccountClient(section, tmp_path / "node")
    old = client.token()
    for end in (accounts.revoke, accounts.unlink):
        end(accounts.operator, node.peer_id)
        with pytest.raises(IdentityError, match="TokenWrong"):
            client.submit_reward(0, 0, 1, node.peer_id)
        assert enrol(node, ENROLMENT_TOKEN, section, tmp_path / "node") == address
        assert client.token() != old
        assert accounts.caller(old) is None
        assert client.swarm().account == address
        assert accounts.caller(client.token())[0] == node.peer_id


def test_person_with_an_account_takes_what_an_invitation_enrolled_with_its_rewards(
    chain, service, people, node, tmp_path
) -> None:
    """The service signs for the invitation's account, which nobody has signed in to."""
    _, bob = people
    secret = invitations.create(service.service.accounts.database, 1, time.time() + 60)
    section = service.node_chain()
    nobodys = enrol(node, secret, section, tmp_path / "node")
    client = AccountClient(section, tmp_path / "node")
    client.submit_reward(0, 0, 7, node.peer_id)
    eventually(lambda: chain.coordinator.total_rewards([node.peer_id]) == [7])
    bob.begin(BOB, invitation=secret)
    page = texts(bob.answer(code_of(service, BOB)))
    assert f"{node.peer_id} from {nobodys}" in page
    bob.submit("/nodes/take", peer=node.peer_id)
    eventually(lambda: owner_of(chain, node) == bob.account.address)
    assert chain.coordinator.total_rewards([node.peer_id]) == [7]
    assert enrol(node, secret, section, tmp_path / "node") == bob.account.address

import argparse
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from account_service import ENROLMENT_TOKEN, eventually, some_identity
from eth_account import Account as EthAccount

from tests.account.hosting import HOST
from tests.account.people import ADA, BOB, signed_in
from tests.account.visitor import Visitor, texts
from worker.account import account_pages, invitations, sessions
from worker.account.accounts import TOKEN_SECONDS, digest
from worker.account.request_bodies import Refused
from worker.chain.account_client import AccountClient
from worker.chain.registration import enrol
from worker.commands import account_admin
from worker.errors import ChainUnreachable, IdentityError, ResourceError, SettingsError


@pytest.fixture
def ada(service):
    visitor = signed_in(service)
    visitor.account = service.service.accounts.by_email(ADA)
    return visitor


@pytest.fixture
def node(tmp_path_factory):
    return some_identity(tmp_path_factory.getbasetemp())


def test_page_shows_nodes_with_rewards_and_transactions(chain, service, ada) -> None:
    token = service.service.accounts.link(ada.account, "QmAda1", "gpu-0")
    assert "gpu-0" in texts(ada.get("/"))
    assert "linked" in texts(ada.get("/"))
    for path, more in (
        ("register-peer", {}),
        ("submit-reward", {"roundNumber": 0, "stageNumber": 0, "reward": 1250}),
    ):
        answer = requests.post(
            f"{service.url}/api/{path}",
            json={"orgId": ada.account.org_id, "peerId": "QmAda1", **more},
            headers={"Authorization": f"Bearer {token}"},
            timeout=20,
        )
        assert answer.status_code == 200
    eventually(lambda: chain.coordinator.total_rewards(["QmAda1"]) == [1250])
    page = texts(ada.get("/"))
    assert "1.250" in page
    assert "training" in page
    listed = texts(ada.get("/transactions"))
    assert "submitReward" in listed
    assert answer.json()["hash"] in listed
    eventually(lambda: texts(ada.get("/transactions")).count(" confirmed ") == 2)


def test_reward_that_waits_is_shown_as_pending_and_listed(chain, service, ada, monkeypatch) -> None:
    """Also one whose call was answered with HTTP 503: it is sent later."""

    def fail(*_: object) -> None:
        raise ChainUnreachable("no answer")

    token = service.service.accounts.link(ada.account, "QmAda1", "gpu-0")

    def call(path: str, **more: int) -> int:
        return requests.post(
            f"{service.url}/api/{path}",
            json={"orgId": ada.account.org_id, "peerId": "QmAda1", **more},
            headers={"Authorization": f"Bearer {token}"},
            timeout=20,
        ).status_code

    assert call("register-peer") == 200
    eventually(lambda: not service.service.queues.waiting(ada.account))
    with monkeypatch.context() as away:
        away.setattr(service.service._coordinator, "send_raw", fail)
        reward = {"roundNumber": 0, "stageNumber": 0, "reward": 1250}
        assert [call("submit-reward", **reward) for _ in range(2)] == [503, 503]
        page = texts(ada.get("/"))
        assert "0.000 1.250 1 waiting" in page
        listed = texts(ada.get("/transactions"))
        assert listed.count("submitReward waiting 0x") == 1
        assert service.service.accounts.nodes_of(ada.account)[0].last_round == 0
    eventually(lambda: "submitReward confirmed 0x" in texts(ada.get("/transactions")))
    assert "1.250 0.000" in texts(ada.get("/"))


def test_node_that_only_reads_is_seen_and_keeps_its_token(service, ada) -> None:
    accounts = service.service.accounts
    token = accounts.link(ada.account, "QmAda1", "gpu-0")
    soon = time.time() + 100
    accounts.database.execute("UPDATE nodes SET token_expires_at = ?", (soon,))
    body = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
    headers = {"Authorization": f"Bearer {token}"}
    answer = requests.post(f"{service.url}/rpc", json=body, headers=headers, timeout=20)
    assert answer.json()["result"] == hex(31337)
    node = accounts.node("QmAda1")
    assert node.seen_at > soon - 101
    assert node.token_expires_at > soon + TOKEN_SECONDS - 200


def test_node_is_renamed_revoked_and_unlinked(service, ada) -> None:
    accounts = service.service.accounts
    token = accounts.link(ada.account, "QmAda1", "gpu-0")
    ada.submit("/nodes/rename", peer="QmAda1", name="under the desk")
    assert "under the desk" in texts(ada.get("/"))
    ada.submit("/nodes/revoke", peer="QmAda1")
    assert "revoked" in texts(ada.get("/"))
    assert accounts.caller(token) is None
    ada.submit("/nodes/unlink", peer="QmAda1")
    assert "No node is linked yet" in texts(ada.get("/"))


def test_other_peoples_nodes_are_out_of_reach(service, ada) -> None:
    accounts = service.service.accounts
    bob = accounts.create(BOB, 3)
    token = accounts.link(bob, "QmBob1", "bobs")
    for path in ("/nodes/rename", "/nodes/revoke", "/nodes/unlink"):
        assert ada.submit(path, peer="QmBob1", name="mine now").status_code == 404
    assert accounts.caller(token) == ("QmBob1", bob)
    assert ada.get("/host").status_code == 404
    assert ada.submit("/host/suspend", account=bob.org_id, suspend="yes").status_code == 404


def test_key_is_exported_after_a_fresh_sign_in_only(service, ada, monkeypatch) -> None:
    csrf = ada.csrf("/settings")
    assert ada.post("/settings/export", csrf=csrf, password="short").status_code == 400
    answer = ada.post("/settings/export", csrf=csrf, password="long enough password")
    assert "attachment" in answer.headers["Content-Disposition"]
    key = EthAccount.decrypt(json.dumps(answer.json()), "long enough password")
    assert EthAccount.from_key(key).address == ada.account.address
    now = time.time()
    monkeypatch.setattr(sessions.time, "time", lambda: now + sessions.FRESH_SECONDS + 1)
    stale = ada.post("/settings/export", csrf=csrf, password="long enough password")
    assert stale.status_code == 403
    assert "Sign in again first" in texts(ada.get("/settings"))


def test_account_is_deleted_when_nothing_is_pending(service, chain, ada) -> None:
    accounts, queues = service.service.accounts, service.service.queues
    address = ada.account.address
    queue = queues.of(ada.account)
    queue._sign_all([(chain.coordinator.register_peer("QmAda1"), 500_000)])
    assert ada.submit("/settings/delete", on="/settings", address="0x0").status_code == 400
    refused = ada.submit("/settings/delete", on="/settings", address=address)
    assert (refused.status_code, "not on the chain yet" in texts(refused)) == (409, True)
    eventually(lambda: not queues.waiting(ada.account))
    ada.submit("/settings/delete", on="/settings", address=address)
    assert not ada.is_signed_in
    assert accounts.by_email(ADA) is None
    assert chain.peers_of(address) == ["QmAda1"]


def test_refused_deletion_leaves_a_suspension_as_it_was(service, chain, ada) -> None:
    accounts, address = service.service.accounts, ada.account.address
    queue = service.service.queues.of(ada.account)
    queue._sign_all([(chain.coordinator.register_peer("QmAda1"), 500_000)])
    for is_suspended in (True, False):
        accounts.set_suspended(ada.account.id, is_suspended)
        refused = ada.submit("/settings/delete", on="/settings", address=address)
        assert refused.status_code == 409
        assert (accounts.by_email(ADA).suspended_at is not None) == is_suspended
    assert service.service.queues.of(ada.account) is queue


def test_deletion_that_fails_leaves_the_account_as_it_was(chain, service, ada, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ResourceError("the disk is full")

    accounts, queues = service.service.accounts, service.service.queues
    monkeypatch.setattr(accounts, "delete", fail)
    answer = ada.submit("/settings/delete", on="/settings", address=ada.account.address)
    assert answer.status_code == 503
    assert accounts.by_email(ADA).suspended_at is None
    queues.of(ada.account).send(chain.coordinator.register_peer("QmAda1"))
    eventually(lambda: chain.peers_of(ada.account.address) == ["QmAda1"])


def test_nothing_is_sent_for_an_account_that_is_deleted(service, chain, ada) -> None:
    """Neither by a queue that a call holds already."""
    queues = service.service.queues
    queue = queues.of(ada.account)
    with queues.ended(ada.account) as is_idle:
        assert is_idle
        with pytest.raises(Refused, match="being deleted"):
            queues.of(ada.account)
        with pytest.raises(ResourceError, match="closed database"):
            queue.send(chain.coordinator.register_peer("QmAda1"))


def test_keys_are_exported_one_at_a_time_and_seldom(service, ada, monkeypatch) -> None:
    """Each takes 256 MiB."""
    running, most = [], []

    def keystore(*_: object) -> bytes:
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return b"{}"

    monkeypatch.setattr(account_pages.AccountPages, "_keystore", keystore)
    csrf = ada.csrf("/settings")

    def export(_: int) -> int:
        return ada.post("/settings/export", csrf=csrf, password="long enough").status_code

    with ThreadPoolExecutor(7) as pool:
        statuses = sorted(pool.map(export, range(7)))
    assert statuses == [200] * 5 + [429] * 2
    assert set(most) == {1}


def test_host_sees_who_joined_and_changes_quotas(service, ada) -> None:
    accounts = service.service.accounts
    host = signed_in(service, HOST)
    page = texts(host.get("/host"))
    assert ADA in page
    assert "0 of 10" in page
    host.submit("/host/quota", on="/host", account=ada.account.org_id, nodes="3")
    assert accounts.by_email(ADA).max_nodes == 3
    host.submit("/host/suspend", on="/host", account=ada.account.org_id, suspend="yes")
    assert "suspended this account" in texts(ada.get("/"))
    host.submit("/host/suspend", on="/host", account=ada.account.org_id, suspend="no")
    assert "suspended this account" not in texts(ada.get("/"))
    own = texts(host.get("/"))
    assert accounts.operator.address in own
    assert "0 nodes, round 0" in own  # without a quota


def test_person_joins_by_an_invitation_of_the_host(service) -> None:
    host = signed_in(service, HOST)
    page = host.submit("/host/invite", on="/host", nodes="2", days="1").text
    secret = re.search("hwi_[A-Za-z0-9_-]+", page)[0]
    assert f"/sign-in#invitation={secret}" in page
    assert secret not in host.get("/host").text


def test_host_withdraws_an_invitation_that_leaked(service, ada, node, tmp_path) -> None:
    host = signed_in(service, HOST)
    page = host.submit("/host/invite", on="/host", nodes="2", days="1").text
    secret = re.search("hwi_[A-Za-z0-9_-]+", page)[0]
    assert "For 2 nodes, 0 used, until" in texts(host.get("/host"))
    shown = digest(secret).hex()
    assert ada.submit("/host/withdraw", invitation=shown).status_code == 404
    host.submit("/host/withdraw", on="/host", invitation=shown)
    assert "For 2 nodes" not in texts(host.get("/host"))
    with pytest.raises(IdentityError, match="unknown, used up or expired"):
        AccountClient(service.node_chain(), tmp_path / "node").enrol(node, secret)


# ---- invitations as enrolment tokens


def test_nodes_enrol_by_an_invitation_for_its_account(chain, service, ada, node, tmp_path) -> None:
    page = ada.submit("/invitations/create", nodes="1", days="1").text
    secret = re.search("hwi_[A-Za-z0-9_-]+", page)[0]
    assert enrol(node, secret, service.node_chain(), tmp_path / "node") == ada.account.address
    assert chain.peers_of(ada.account.address) == [node.peer_id]
    # Again with both: nothing changes.
    assert enrol(node, secret, service.node_chain(), tmp_path / "node") == ada.account.address
    assert "1 of 1 nodes used" in texts(ada.get("/"))
    client = AccountClient(service.node_chain(), tmp_path / "other")
    other = some_identity(tmp_path, 1)
    with pytest.raises(IdentityError, match="was for 1 nodes"):
        client.enrol(other, secret)


def test_invitation_of_the_host_is_an_account_before_anybody_signs_in(
    service, node, tmp_path
) -> None:
    """Its rewards are the person's who signs in with it later."""
    accounts = service.service.accounts
    secret = invitations.create(accounts.database, 2, time.time() + 60)
    address = enrol(node, secret, service.node_chain(), tmp_path / "node")
    assert address not in (accounts.operator.address, None)
    visitor = Visitor(service.url)
    visitor.begin(ADA, invitation=secret)
    sessions.Sessions(accounts.database).set_code(ADA, "11111111")
    visitor.answer("11111111")
    assert accounts.by_email(ADA).address == address
    assert node.peer_id in texts(visitor.get("/"))


def test_account_has_so_and_so_many_invitations_at_a_time(service, ada, monkeypatch) -> None:
    monkeypatch.setattr(account_pages, "_MAX_INVITATIONS", 2)
    statuses = [
        ada.submit("/invitations/create", nodes="1", days="1").status_code for _ in range(3)
    ]
    assert statuses == [200, 200, 400]


def test_passkey_is_added_after_a_fresh_sign_in_only(service, ada, monkeypatch) -> None:
    """A session that somebody left open gives no lasting way in."""
    ada.url = service.url.replace("127.0.0.1", "localhost")
    csrf = ada.csrf("/settings")

    def begin() -> int:
        cookies = "; ".join(f"{name}={value}" for name, value in ada.cookies.items())
        headers = ada.headers | {"Origin": ada.url, "Cookie": cookies}
        place = f"{ada.url}/passkeys/begin-adding"
        return requests.post(place, json={"csrf": csrf}, headers=headers, timeout=20).status_code

    assert begin() == 200
    now = time.time()
    monkeypatch.setattr(sessions.time, "time", lambda: now + sessions.FRESH_SECONDS + 1)
    assert begin() == 403
    assert "Sign in again to add one" in texts(ada.get("/settings"))


@pytest.mark.parametrize("state", ["unknown", "over", "withdrawn"])
def test_invalid_invitation_enrols_nobody(service, ada, node, tmp_path, state) -> None:
    accounts = service.service.accounts
    until = time.time() + (60 if state == "withdrawn" else -1)
    secret = invitations.create(accounts.database, 2, until, ada.account)
    if state == "unknown":
        secret = "hwi_unknown"
    if state == "withdrawn":
        (invitation,) = service.service._site.invitations.of(ada.account)
        ada.submit("/invitations/withdraw", invitation=invitation.hash.hex())
    with pytest.raises(IdentityError, match="this invitation is unknown, used up or expired"):
        AccountClient(service.node_chain(), tmp_path / "node").enrol(node, secret)


# ---- the host's commands


def test_host_prints_a_code_for_somebody_who_waits(host, service, capsys) -> None:
    visitor = Visitor(service.url)
    with pytest.raises(SettingsError, match="nobody waits"):
        account_admin.code(host, argparse.Namespace(email=ADA))
    visitor.begin(ADA)
    account_admin.code(host, argparse.Namespace(email=ADA.upper()))
    visitor.answer(capsys.readouterr().out.split()[0])
    assert visitor.is_signed_in


@pytest.mark.parametrize("until", ["tomorrow", "2020-01-01"])
def test_invitation_needs_a_day_to_come(host, service, until) -> None:
    with pytest.raises(SettingsError, match="--until"):
        account_admin.invite(host, argparse.Namespace(nodes=1, until=until))


def test_host_makes_an_invitation(host, service, capsys) -> None:
    (host.account.state_dir / "address").write_text(service.url + "\n")
    account_admin.invite(host, argparse.Namespace(nodes=2, until="2999-01-01"))
    link, token = (line.split()[1] for line in capsys.readouterr().out.splitlines()[-2:])
    assert link == f"{service.url}/sign-in#invitation={token}"


# ---- identity rules of the guide


def test_fleet_enrols_for_the_operators_account_as_before(service, node, tmp_path) -> None:
    address = enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path / "node")
    assert address == service.service.address
    names = [
        each.peer_id
        for each in service.service.accounts.nodes_of(service.service.accounts.operator)
    ]
    assert names == [node.peer_id]


def test_key_of_another_account_is_refused_with_both_addresses(
    service, ada, node, tmp_path
) -> None:
    accounts = service.service.accounts
    enrol(node, ENROLMENT_TOKEN, service.node_chain(), tmp_path / "node")
    secret = invitations.create(accounts.database, 2, time.time() + 60, ada.account)
    with pytest.raises(
        IdentityError, match=f"{accounts.operator.address}.*{ada.account.address}.*unlink"
    ):
        AccountClient(service.node_chain(), tmp_path / "again").enrol(node, secret)


def test_several_nodes_and_a_lost_key_have_one_account(service, ada, tmp_path) -> None:
    """A new key on a machine whose key is lost is a new node of the same account."""
    accounts = service.service.accounts
    secret = invitations.create(accounts.database, 3, time.time() + 60, ada.account)
    nodes = [some_identity(tmp_path, number) for number in range(2)]
    addresses = {
        enrol(each, secret, service.node_chain(), tmp_path / f"node-{place}")
        for place, each in enumerate(nodes)
    }
    assert addresses == {ada.account.address}
    assert len(accounts.nodes_of(ada.account)) == 2


def test_node_that_moves_to_another_machine_keeps_its_account(service, ada, node, tmp_path) -> None:
    """Its key signs in there; the token of the machine before is not valid any more."""
    accounts = service.service.accounts
    secret = invitations.create(accounts.database, 1, time.time() + 60, ada.account)
    enrol(node, secret, service.node_chain(), tmp_path / "old")
    enrol(node, secret, service.node_chain(), tmp_path / "new")
    tokens = [(tmp_path / place / "account.token").read_text().strip() for place in ("old", "new")]
    assert accounts.caller(tokens[0]) is None
    assert accounts.caller(tokens[1])[0] == node.peer_id


def test_node_moves_to_another_account_when_owner_and_key_agree(
    chain, service, ada, node, tmp_path
) -> None:
    accounts = service.service.accounts
    bob = accounts.create(BOB, 3)
    theirs = invitations.create(accounts.database, 1, time.time() + 60, bob)
    enrol(node, theirs, service.node_chain(), tmp_path / "old")
    ours = invitations.create(accounts.database, 1, time.time() + 60, ada.account)
    with pytest.raises(IdentityError, match="PeerOfAnotherAccount"):
        enrol(node, ours, service.node_chain(), tmp_path / "new", move=True)
    accounts.unlink(bob, node.peer_id)
    address = enrol(node, ours, service.node_chain(), tmp_path / "new", move=True)
    assert address == ada.account.address
    assert chain.peers_of(ada.account.address) == [node.peer_id]

"""Invitations: for a number of nodes, for a person, for a time, and for nobody else."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.account.stores import Clock
from worker.account import invitations as module
from worker.account.accounts import Account, Accounts, digest
from worker.account.invitations import Invitations, create
from worker.account.releases import releases_to
from worker.account.request_bodies import Refused
from worker.account.sessions import Sessions

PEERS = [f"QmPeer{number}" for number in range(9)]
DAY = 86_400.0


@pytest.fixture
def invitations(accounts: Accounts) -> Invitations:
    return Invitations(accounts)


@pytest.fixture
def ada(accounts: Accounts) -> Account:
    return accounts.create("ada@example.org", 3)


def invite(accounts: Accounts, num_nodes: int, account: Account | None = None) -> str:
    return create(accounts.database, num_nodes, time.time() + DAY, account)


def refusal(call: object, *arguments: object) -> Refused:
    with pytest.raises(Refused) as refused:
        call(*arguments)  # type: ignore[operator]
    return refused.value


def test_invitation_enrols_as_many_nodes_as_it_says(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 2, ada)
    assert secret.startswith(module.PREFIX)
    for peer in PEERS[:2]:
        token = invitations.enrol(secret, peer)
        assert accounts.caller(token) == (peer, ada)
    found = refusal(invitations.enrol, secret, PEERS[2])
    assert (found.status, found.error) == (403, "InvitationInvalid")
    assert "was for 2 nodes, which have used it" in str(found)
    (left,) = invitations.of(ada)
    assert (left.max_nodes, left.used) == (2, 2)


def test_node_that_enrols_again_uses_nothing_up(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 1, ada)
    first = invitations.enrol(secret, PEERS[0])
    again = invitations.enrol(secret, PEERS[0])
    assert accounts.caller(first) is None
    assert accounts.caller(again) == (PEERS[0], ada)
    assert invitations.of(ada)[0].used == 1


def test_node_that_the_account_can_not_have_uses_nothing_up(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 9, ada)
    for peer in PEERS[:3]:
        invitations.enrol(secret, peer)
    assert refusal(invitations.enrol, secret, PEERS[3]).error == "TooManyNodes"
    bob = accounts.create("bob@example.org", 1)
    accounts.link(bob, PEERS[4])
    accounts.set_max_nodes(ada.id, 9)
    assert refusal(invitations.enrol, secret, PEERS[4]).error == "PeerOfAnotherAccount"
    accounts.set_suspended(ada.id, True)
    assert refusal(invitations.enrol, secret, PEERS[5]).error == "AccountSuspended"
    assert invitations.of(ada)[0].used == 3


def test_invitation_of_the_host_makes_one_account_for_all_of_its_nodes(
    accounts: Accounts, invitations: Invitations
) -> None:
    secret = invite(accounts, 2)
    tokens = [invitations.enrol(secret, peer) for peer in PEERS[:2]]
    callers = [accounts.caller(token) for token in tokens]
    owners = {caller[1].id for caller in callers if caller is not None}
    assert len(owners) == 1
    assert len(accounts.all()) == 2
    owner = accounts.by_id(owners.pop())
    assert (owner.email, owner.max_nodes, owner.is_operator) == (None, 2, False)


def test_nodes_that_enrol_at_once_share_one_account_and_no_place(
    accounts: Accounts, invitations: Invitations
) -> None:
    secret = invite(accounts, 3)

    def enrol(peer: str) -> str | None:
        try:
            return invitations.enrol(secret, peer)
        except Refused:
            return None

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(enrol, PEERS[:8]))
    given = [token for token in tokens if token is not None]
    assert len(given) == 3
    assert len({accounts.caller(token)[1].id for token in given}) == 1  # type: ignore[index]
    assert len(accounts.all()) == 2


@pytest.mark.parametrize("secret", ["", "hwi_", "hwi_unknown", "\0", "x" * 10_000])
def test_unknown_secret_is_refused(
    accounts: Accounts, invitations: Invitations, ada: Account, secret: str
) -> None:
    invite(accounts, 1, ada)
    found = refusal(invitations.enrol, secret, PEERS[0])
    assert (found.status, found.error) == (403, "InvitationInvalid")
    assert str(found) == "this invitation is unknown, used up or expired; ask for a new one"
    assert accounts.nodes_of(ada) == []


def test_invitation_ends_at_its_time(
    accounts: Accounts, invitations: Invitations, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    secret = invite(accounts, 5, ada)
    clock.wait(DAY - 1)
    invitations.enrol(secret, PEERS[0])
    clock.wait(1)
    assert refusal(invitations.enrol, secret, PEERS[1]).error == "InvitationInvalid"
    assert invitations.of(ada) == []


def test_invitation_is_withdrawn_by_its_account_only(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 5, ada)
    bob = accounts.create("bob@example.org", 1)
    invitations.withdraw(bob, digest(secret))
    assert len(invitations.of(ada)) == 1
    assert invitations.of(bob) == []
    invitations.withdraw(ada, digest(secret))
    assert refusal(invitations.enrol, secret, PEERS[0]).error == "InvitationInvalid"


def test_person_takes_the_account_of_the_invitation_with_its_nodes(
    accounts: Accounts, invitations: Invitations
) -> None:
    secret = invite(accounts, 2)
    token = invitations.enrol(secret, PEERS[0])
    person = invitations.accept(digest(secret), "cy@example.org")
    assert accounts.caller(token) == (PEERS[0], person)
    assert person.email == "cy@example.org"
    assert invitations.accept(digest(secret), "cy@example.org") == person


def test_invitation_ends_no_suspension_of_a_person_who_left(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    accounts.set_suspended(ada.id, True)
    accounts.delete(ada, 10)
    again = invitations.accept(digest(invite(accounts, 5)), "ada@example.org")
    assert again.suspended_at is not None
    assert again.max_nodes == 5


def test_invitation_is_for_one_person(accounts: Accounts, invitations: Invitations) -> None:
    secret = invite(accounts, 2)
    invitations.accept(digest(secret), "cy@example.org")
    found = refusal(invitations.accept, digest(secret), "eve@example.org")
    assert found.status == 403
    assert accounts.by_email("eve@example.org") is None


def test_person_with_an_account_keeps_it(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 2)
    for _ in range(2):
        kept = invitations.accept(digest(secret), "ada@example.org")
        assert (kept.id, kept.max_nodes) == (ada.id, 5)
    assert len(accounts.all()) == 2
    assert accounts.caller(invitations.enrol(secret, PEERS[0])) == (PEERS[0], kept)


def test_person_with_an_account_takes_the_nodes_that_have_enrolled(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 2)
    for peer in PEERS[:2]:
        invitations.enrol(secret, peer)
    kept = invitations.accept(digest(secret), "ada@example.org")
    offers = releases_to(accounts, kept)
    assert [each.peer_id for each in offers] == PEERS[:2]
    holder = accounts.by_id(offers[0].from_id)
    assert holder.is_nobodys
    for peer in PEERS[:2]:
        accounts.move(peer, holder, kept)
    assert accounts.caller(invitations.enrol(secret, PEERS[0])) == (PEERS[0], kept)


def test_suspended_account_of_an_invitation_is_nobodys_to_take(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 2)
    token = invitations.enrol(secret, PEERS[0])
    accounts.set_suspended(accounts.caller(token)[1].id, True)  # type: ignore[index]
    assert refusal(invitations.accept, digest(secret), "ada@example.org").error == (
        "AccountSuspended"
    )
    assert releases_to(accounts, ada) == []


def test_person_may_come_after_the_last_day_if_nodes_have_enrolled(
    accounts: Accounts, invitations: Invitations, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    used, unused = invite(accounts, 2), invite(accounts, 2)
    token = invitations.enrol(used, PEERS[0])
    clock.wait(DAY + 1)
    Sessions(accounts.database).forget_old()
    assert refusal(invitations.enrol, used, PEERS[1]).error == "InvitationInvalid"
    assert refusal(invitations.accept, digest(unused), "bob@example.org").status == 403
    person = invitations.accept(digest(used), "cy@example.org")
    assert accounts.caller(token) == (PEERS[0], person)
    # Then it is over for good.
    Sessions(accounts.database).forget_old()
    assert accounts.database.execute("SELECT count(*) FROM invitations") == [(0,)]


def test_invitation_of_an_account_makes_nobody_its_owner(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    for account in (ada, accounts.operator):
        secret = invite(accounts, 2, account)
        assert refusal(invitations.accept, digest(secret), "eve@example.org").status == 403
    assert accounts.by_id(ada.id).email == "ada@example.org"
    assert accounts.operator.email is None


def test_deleted_account_takes_its_invitations_along(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    secret = invite(accounts, 2, ada)
    accounts.delete(ada)
    assert refusal(invitations.enrol, secret, PEERS[0]).error == "InvitationInvalid"


def test_host_lists_and_withdraws_what_no_person_has_used(
    accounts: Accounts, invitations: Invitations, ada: Account
) -> None:
    invite(accounts, 5, ada)
    unused, enrolled, taken = (invite(accounts, number) for number in (1, 2, 3))
    token = invitations.enrol(enrolled, PEERS[0])
    invitations.accept(digest(taken), "cy@example.org")
    assert [each.max_nodes for each in invitations.of_host()] == [1, 2]
    for secret in (unused, enrolled, taken):
        invitations.withdraw_of_host(digest(secret))
    assert invitations.of_host() == []
    for secret in (unused, enrolled):
        assert refusal(invitations.enrol, secret, PEERS[1]).error == "InvitationInvalid"
    assert accounts.caller(token) is not None
    assert invitations.enrol(taken, PEERS[2])
    assert len(invitations.of(ada)) == 1


def test_host_lists_an_expired_invitation_while_a_person_may_still_use_it(
    accounts: Accounts, invitations: Invitations, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    invite(accounts, 1)
    invitations.enrol(invite(accounts, 2), PEERS[0])
    clock.wait(DAY)
    (left,) = invitations.of_host()
    assert left.max_nodes == 2
    invitations.withdraw_of_host(left.hash)
    assert refusal(invitations.accept, left.hash, "cy@example.org").error == "InvitationInvalid"


def test_end_of_the_process_before_the_node_is_linked_uses_nothing_up(
    accounts: Accounts, invitations: Invitations, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = invite(accounts, 1)

    def end(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as dying:
        dying.setattr(accounts, "link_in", end)
        with pytest.raises(SystemExit):
            invitations.enrol(secret, PEERS[0])
    assert len(accounts.all()) == 1
    assert accounts.caller(invitations.enrol(secret, PEERS[0]))


def test_two_first_sign_ins_of_a_person_at_once_make_one_account(
    accounts: Accounts, invitations: Invitations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with an invitation of its own: neither fails, whichever is faster."""
    barrier = threading.Barrier(2)
    by_email = accounts.by_email

    def together(*arguments: object) -> Account | None:
        found = by_email(*arguments)  # type: ignore[arg-type]
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.3)  # both have looked, unless the second must wait for the first
        return found

    monkeypatch.setattr(accounts, "by_email", together)
    secrets = [digest(invite(accounts, 2)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda hash: invitations.accept(hash, "cy@example.org"), secrets))
    assert found[0].id == found[1].id
    assert len(accounts.all()) == 2

"""A guesser with many addresses: each way in closes for the account, and its owner gets in."""

import re
import time

import pytest
import requests
from account_service import ENROLMENT_TOKEN, serving, some_identity

from tests.account.hosting import hosted
from tests.account.people import ADA, code_of
from tests.account.test_sign_in import mailbox  # noqa: F401 - a fixture
from tests.account.visitor import Visitor, texts
from worker.account import invitations
from worker.account.sessions import Sessions, new_host_code

WRONG = "00000000"


def from_address(service, number: int) -> Visitor:
    """Return a browser with an address of its own, behind the proxy of the service."""
    client = f"203.0.{number // 250}.{number % 250 + 1}"
    return Visitor(service.url, **{"X-Forwarded-For": client, "X-Forwarded-Proto": "https"})


@pytest.fixture
def service(chain, tmp_path):
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as running:
        yield running


def lock_codes(service) -> list[int]:
    """Guess codes of ada from ten addresses, four times each."""
    statuses = []
    for number in range(10):
        thief = from_address(service, number)
        thief.begin(ADA)
        statuses += [thief.answer(WRONG).status_code for _ in range(4)]
    return statuses


def test_codes_are_locked_for_all_but_a_browser_that_has_signed_in_before(service) -> None:
    owner = from_address(service, 400)
    owner.begin(ADA)
    owner.answer(code_of(service, ADA))
    assert owner.is_signed_in
    owner.submit("/sign-out")
    assert lock_codes(service) == [403] * 30 + [429] * 10
    lucky = from_address(service, 401)
    lucky.begin(ADA)
    refused = lucky.answer(code_of(service, ADA))
    assert refused.status_code == 429
    assert "another way in" in texts(refused)
    owner.begin(ADA)
    owner.answer(code_of(service, ADA))
    assert owner.is_signed_in
    # Others are not locked.
    bob = from_address(service, 402)
    bob.begin("bob@example.org")
    bob.answer(code_of(service, "bob@example.org"))
    assert bob.is_signed_in


def test_code_of_the_host_lets_the_owner_in_with_a_new_browser(service) -> None:
    """It is too long to guess, so it needs no limit of the account."""
    lock_codes(service)
    owner = from_address(service, 400)
    owner.begin(ADA)
    code = code_of(service, ADA, new_host_code())
    assert re.fullmatch("[B-Z]{4}-[B-Z]{4}-[B-Z]{4}", code)
    assert owner.answer("BBBB BBBB BBBB").status_code == 403
    owner.answer(code.lower().replace("-", " "))
    assert owner.is_signed_in


def test_known_browser_is_known_to_its_own_account_only(service) -> None:
    bob = from_address(service, 400)
    bob.begin("bob@example.org")
    bob.answer(code_of(service, "bob@example.org"))
    lock_codes(service)
    bob.begin(ADA)
    assert bob.answer(code_of(service, ADA)).status_code == 429


def test_sign_out_everywhere_forgets_the_browsers(service) -> None:
    owner = from_address(service, 400)
    owner.begin(ADA)
    owner.answer(code_of(service, ADA))
    known = owner.cookies["__Host-hivewright_known"]
    account = service.service.accounts.by_email(ADA)
    kept = Sessions(service.service.accounts.database)
    assert kept.known_account(known) == account.id
    owner.submit("/sign-out", everywhere="yes")
    assert kept.known_account(known) is None


def test_mails_that_others_ask_for_do_not_keep_the_owner_out(chain, tmp_path, mailbox) -> None:  # noqa: F811
    parsed = hosted(
        chain.settings,
        tmp_path / "account",
        behind_proxy=True,
        smtp_host="127.0.0.1",
        smtp_port=mailbox.port,
        smtp_security="none",
    )
    with serving(parsed) as running:
        owner = from_address(running, 400)
        owner.begin(ADA)
        owner.answer(mailbox.code())
        statuses = [from_address(running, number).begin(ADA).status_code for number in range(61)]
        assert set(statuses[:59]) == {200}
        assert statuses[-1] == 429
        assert owner.begin(ADA).status_code == 200
        owner.answer(mailbox.code())
        assert owner.is_signed_in


def test_wrong_invitations_are_limited_for_their_address_and_keep_nobody_else_out(service) -> None:
    """They are too long to guess from many addresses."""
    secret = invitations.create(service.service.accounts.database, 2, time.time() + 60)
    thief = from_address(service, 0)
    statuses = [thief.begin(ADA, invitation="hwi_wrong").status_code for _ in range(12)]
    assert statuses == [403] * 10 + [429] * 2
    assert thief.begin(ADA, invitation=secret).status_code == 429
    assert from_address(service, 1).begin(ADA, invitation=secret).status_code == 200


def test_guesser_behind_the_same_address_does_not_keep_the_owner_out(
    service, tmp_path_factory
) -> None:
    """By guessing codes, terminals' codes and enrolment tokens, or beginning many sign-ins."""
    owner, thief = from_address(service, 400), from_address(service, 400)
    owner.begin(ADA)
    owner.answer(code_of(service, ADA))
    csrf = owner.csrf("/device")
    thief.begin("eve@example.org")
    thief.answer(code_of(service, "eve@example.org"))
    own_csrf = thief.csrf("/device")
    statuses = [thief.post("/device", csrf=own_csrf, code="BBBB-BBBB") for _ in range(11)]
    assert [each.status_code for each in statuses] == [400] * 10 + [429]
    assert owner.post("/device", csrf=csrf, code="BBBB-BBBB").status_code == 400
    thief = from_address(service, 400)
    for _ in range(3):
        thief.begin(ADA)
        statuses = [thief.answer(WRONG).status_code for _ in range(4)]
    assert statuses == [403, 403, 429, 429]
    while thief.begin(ADA).status_code == 200:
        pass
    assert owner.begin(ADA).status_code == 200
    owner.answer(code_of(service, ADA))
    assert owner.is_signed_in
    ours, thiefs = (some_identity(tmp_path_factory.getbasetemp(), i) for i in range(2))
    assert enrol(service, ours, ENROLMENT_TOKEN, 400) == 200
    statuses = [enrol(service, thiefs, "guess", 400) for _ in range(21)]
    assert statuses == [403] * 20 + [429]
    assert enrol(service, ours, ENROLMENT_TOKEN, 400) == 200


def test_terminals_codes_are_locked_for_the_account_that_guesses(service) -> None:
    thief = from_address(service, 0)
    thief.begin("eve@example.org")
    thief.answer(code_of(service, "eve@example.org"))
    csrf, statuses = thief.csrf("/device"), []
    for number in range(32):
        thief.headers["X-Forwarded-For"] = f"203.0.9.{number}"
        statuses.append(thief.post("/device", csrf=csrf, code="BBBB-BBBB").status_code)
    assert statuses == [400] * 10 + [429] * 22


def test_wrong_passkeys_are_locked_and_codes_are_not(service) -> None:
    """A passkey of ada, whose signature somebody else does not have."""
    owner = from_address(service, 400)
    owner.begin(ADA)
    owner.answer(code_of(service, ADA))
    accounts = service.service.accounts
    account = accounts.by_email(ADA)
    accounts.database.execute(
        "INSERT INTO passkeys VALUES (?, ?, ?, 0, 0, ?)", (b"key", account.id, b"public", ADA)
    )
    credential = {
        "id": "a2V5",
        "rawId": "a2V5",
        "type": "public-key",
        "response": {"clientDataJSON": "e30", "authenticatorData": "AA", "signature": "AA"},
    }
    statuses = []
    for number in range(32):
        thief = from_address(service, number)
        thief.url = service.url.replace("127.0.0.1", "localhost")
        statuses.append(passkey(thief, credential))
    assert statuses == [400] * 30 + [429] * 2
    newcomer = from_address(service, 401)
    newcomer.begin(ADA)
    newcomer.answer(code_of(service, ADA))
    assert newcomer.is_signed_in


def passkey(visitor: Visitor, credential: dict) -> int:
    """Answer a new challenge; return the status."""
    headers = {
        **visitor.headers,
        "Origin": visitor.origin,
        "Sec-Fetch-Site": "same-origin",
    }
    begun = requests.post(f"{visitor.url}/passkeys/begin", json={}, headers=headers, timeout=20)
    assert begun.status_code == 200, begun.text
    visitor._keep(begun)
    cookies = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    answer = requests.post(
        f"{visitor.url}/passkeys/sign-in",
        json={"credential": credential},
        headers={**headers, "Cookie": cookies},
        timeout=20,
    )
    return answer.status_code


def enrol(service, node, token: str, number: int) -> int:
    body = service.enrol_body(node, token)
    headers = {"X-Forwarded-For": f"203.0.{number // 250}.{number % 250 + 1}"}
    answer = requests.post(f"{service.url}/api/enrol", json=body, headers=headers, timeout=20)
    return answer.status_code


def test_enrolment_is_locked_for_new_nodes_and_not_for_those_that_are_linked(
    service, tmp_path_factory
) -> None:
    ours, thiefs, new = (some_identity(tmp_path_factory.getbasetemp(), i) for i in range(3))
    assert enrol(service, ours, ENROLMENT_TOKEN, 999) == 200
    statuses = [enrol(service, thiefs, f"guess {number}", number) for number in range(102)]
    assert statuses == [403] * 100 + [429] * 2
    assert enrol(service, thiefs, ENROLMENT_TOKEN, 200) == 429  # nor is it told that it is right
    assert enrol(service, ours, ENROLMENT_TOKEN, 201) == 200
    accounts = service.service.accounts
    secret = invitations.create(accounts.database, 1, time.time() + 60)
    assert enrol(service, new, secret, 202) == 200


def test_node_of_a_person_has_no_more_guesses_of_the_fleets_token_than_others(
    service, tmp_path_factory
) -> None:
    node = some_identity(tmp_path_factory.getbasetemp())
    accounts = service.service.accounts
    eve = accounts.create("eve@example.org", 2)
    accounts.link(eve, node.peer_id)
    statuses = [enrol(service, node, f"guess {number}", number) for number in range(102)]
    assert statuses == [403] * 100 + [429] * 2
    # Her own invitation is another thing.
    secret = invitations.create(accounts.database, 1, time.time() + 60, eve)
    assert enrol(service, node, secret, 0) == 200

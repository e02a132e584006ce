"""Passkeys: who may add one, and that what was signed once lets nobody in again."""

import time
from typing import Any

import pytest
import requests

from tests.account.authenticator import Authenticator
from tests.account.people import ADA, BOB, signed_in
from tests.account.visitor import Visitor
from worker.account import passkeys, sessions


@pytest.fixture
def url(service) -> str:
    """Return the address by its name: passkeys are bound to names."""
    return service.url.replace("127.0.0.1", "localhost")


@pytest.fixture
def ada(service, url) -> Visitor:
    return person(service, url, ADA)


def person(service, url: str, email: str) -> Visitor:
    visitor = signed_in(service, email)
    visitor.url = url
    return visitor


def post(visitor: Visitor, path: str, **body: Any) -> requests.Response:
    """Send what the page's script sends."""
    cookies = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    own = {"Origin": visitor.url, "Sec-Fetch-Site": "same-origin", "Cookie": cookies}
    answer = requests.post(
        f"{visitor.url}/passkeys/{path}", json=body, headers=visitor.headers | own, timeout=20
    )
    visitor._keep(answer)
    return answer


def begin_adding(visitor: Visitor) -> tuple[str, dict[str, Any]]:
    csrf = visitor.csrf("/settings")
    return csrf, post(visitor, "begin-adding", csrf=csrf).json()


def add(visitor: Visitor, key: Authenticator) -> requests.Response:
    csrf, options = begin_adding(visitor)
    return post(visitor, "add", csrf=csrf, credential=key.make(options))


def num_passkeys(service) -> int:
    return service.service.accounts.database.execute("SELECT count(*) FROM passkeys")[0][0]


def test_passkey_that_was_added_signs_in(service, url, ada) -> None:
    key = Authenticator(url)
    assert add(ada, key).status_code == 200
    visitor = Visitor(url)
    options = post(visitor, "begin", next="key").json()
    answer = post(visitor, "sign-in", credential=key.sign(options))
    assert (answer.status_code, answer.json()) == (200, {"next": "/settings"})
    assert visitor.is_signed_in


def test_stale_session_adds_none_by_any_challenge(service, url, ada, monkeypatch) -> None:
    """Nor by the challenge of anybody who begins to sign in, which needs no session."""
    csrf, options = begin_adding(ada)
    anybodys = Visitor(url)
    anybodys.cookies = dict(ada.cookies)
    of_sign_in = post(anybodys, "begin").json()
    now = time.time()
    monkeypatch.setattr(sessions.time, "time", lambda: now + sessions.FRESH_SECONDS + 1)
    key = Authenticator(url)
    for visitor, challenge in ((ada, options), (anybodys, of_sign_in)):
        answer = post(visitor, "add", csrf=csrf, credential=key.make(challenge))
        assert answer.status_code == 403
        assert "within the last five minutes" in answer.json()["error"]
    assert num_passkeys(service) == 0


def test_challenge_is_for_its_own_purpose(service, url, ada) -> None:
    key = Authenticator(url)
    assert add(ada, key).status_code == 200
    csrf, options = begin_adding(ada)
    assert post(ada, "sign-in", credential=key.sign(options)).status_code == 400
    of_sign_in = post(ada, "begin").json()
    other = Authenticator(url, b"other")
    answer = post(ada, "add", csrf=csrf, credential=other.make(of_sign_in))
    assert answer.status_code == 400
    assert "answers another request" in answer.json()["error"]
    assert num_passkeys(service) == 1


def test_challenge_of_one_account_adds_none_to_another(service, url, ada) -> None:
    _, options = begin_adding(ada)
    bob = person(service, url, BOB)
    bob.cookies["hivewright_sign_in"] = ada.cookies["hivewright_sign_in"]
    key = Authenticator(url)
    answer = post(bob, "add", csrf=bob.csrf("/settings"), credential=key.make(options))
    assert answer.status_code == 403
    assert num_passkeys(service) == 0


def test_passkeys_that_are_added_at_once_are_as_many_as_an_account_may_have(
    service, url, ada, monkeypatch
) -> None:
    monkeypatch.setattr(passkeys, "_MAX_PASSKEYS", 1)
    browsers = (ada, person(service, url, ADA))
    begun = [begin_adding(each) for each in browsers]
    statuses = []
    for number, (browser, (csrf, options)) in enumerate(zip(browsers, begun, strict=True)):
        made = Authenticator(url, f"key {number}".encode()).make(options)
        statuses.append(post(browser, "add", csrf=csrf, credential=made).status_code)
    assert statuses == [200, 400]
    assert num_passkeys(service) == 1


def test_signature_lets_in_once(service, url, ada) -> None:
    """Not again by its own challenge, by another, nor with a counter that has been seen."""
    key = Authenticator(url)
    assert add(ada, key).status_code == 200
    visitor = Visitor(url)
    signed = key.sign(post(visitor, "begin").json())
    challenge = visitor.cookies["hivewright_sign_in"]
    assert post(visitor, "sign-in", credential=signed).status_code == 200
    thief = Visitor(url)
    thief.cookies["hivewright_sign_in"] = challenge
    answer = post(thief, "sign-in", credential=signed)
    assert (answer.status_code, "is over" in answer.json()["error"]) == (400, True)
    options = post(thief, "begin").json()
    assert post(thief, "sign-in", credential=signed).status_code == 400
    key.num_used = 0
    options = post(thief, "begin").json()
    assert post(thief, "sign-in", credential=key.sign(options)).status_code == 400
    assert not thief.is_signed_in

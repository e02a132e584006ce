import re
import socket

import pytest
import requests
from account_service import serving

from tests.account.hosting import hosted
from tests.account.npm_tools import openid_provider
from tests.account.people import ADA, code_of
from tests.account.visitor import Visitor, texts

CALLBACK = "/sign-in/openid/callback"


@pytest.fixture
def signing(chain, tmp_path):
    """Return a service whose people may sign in by a real provider, and the provider's issuer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = f"http://localhost:{port}"
    secret = tmp_path / "client.secret"
    secret.write_text("provider's-secret\n")
    with openid_provider(own + CALLBACK) as issuer:
        parsed = hosted(
            chain.settings,
            tmp_path / "account",
            public_url=own,
            oidc_issuer=issuer,
            oidc_name="Test Provider",
            oidc_client_id="hivewright",
            oidc_client_secret_file=str(secret),
        )
        with serving(parsed, port) as running:
            running.url = own
            yield running


def at_provider(visitor: Visitor, email: str) -> str:
    """Sign in at the provider, as its own pages ask for it; return where it sends the browser."""
    place = visitor.get("/sign-in/openid", follow=False).headers["Location"]
    assert "code_challenge_method=S256" in place
    assert "nonce=" in place
    session = requests.Session()
    answer = session.get(place, timeout=20)
    for fields in ({"prompt": "login", "login": email, "password": "x"}, {"prompt": "consent"}):
        action = re.search(r'action="([^"]+)"', answer.text)[1]
        answer = session.post(action, data=fields, timeout=20, allow_redirects=False)
        while answer.status_code in (302, 303):
            place = requests.compat.urljoin(answer.url, answer.headers["Location"])
            if place.startswith(visitor.url):
                return place
            answer = session.get(place, timeout=20, allow_redirects=False)
    raise AssertionError("the provider did not send the browser back")


def test_provider_signs_in_to_the_account_of_the_same_e_mail(signing) -> None:
    by_mail = Visitor(signing.url)
    by_mail.begin(ADA)
    by_mail.answer(code_of(signing, ADA))
    address = signing.service.accounts.by_email(ADA).address
    visitor = Visitor(signing.url)
    assert "Continue with Test Provider" in texts(visitor.get("/sign-in"))
    answer = visitor.get(at_provider(visitor, ADA))
    assert address in texts(answer)


def test_address_that_the_provider_has_not_verified_is_refused(signing) -> None:
    visitor = Visitor(signing.url)
    answer = visitor.get(at_provider(visitor, "unverified@example.org"))
    assert answer.status_code == 403
    assert "has not verified" in texts(answer)
    assert not visitor.is_signed_in


def test_answer_of_another_sign_in_is_refused_and_none_works_twice(signing) -> None:
    """A code that somebody else brings, a state of another browser, and a replay."""
    thief, visitor = Visitor(signing.url), Visitor(signing.url)
    place = at_provider(visitor, ADA)
    thief.get("/sign-in/openid", follow=False)
    assert thief.get(place).status_code == 400
    assert Visitor(signing.url).get(place).status_code == 400
    wrong = re.sub(r"state=[^&]+", "state=else", place)
    assert visitor.get(wrong).status_code == 400
    assert visitor.get(place).status_code == 200
    assert visitor.is_signed_in
    assert visitor.get(place).status_code == 400


def test_provider_that_is_down_is_said(chain, tmp_path) -> None:
    parsed = hosted(
        chain.settings,
        tmp_path / "account",
        oidc_issuer="http://localhost:1",
        oidc_client_id="hivewright",
    )
    with serving(parsed) as running:
        answer = Visitor(running.url).get("/sign-in/openid")
        assert answer.status_code == 503
        assert "account.oidc_issuer" in texts(answer)

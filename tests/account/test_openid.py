import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from account_service import serving
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet
from playwright.sync_api import expect

from tests.account.hosting import hosted
from tests.account.npm_tools import openid_provider
from tests.account.people import ADA, code_of
from tests.account.visitor import Visitor, texts
from worker.account import invitations, mail, openid
from worker.account.request_bodies import Refused
from worker.account.sessions import SignIn
from worker.settings import Account as Section

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


class StandIn:
    """A provider that says what a test wants: no pages, one person, keys that it may change."""

    def __init__(self) -> None:
        self.in_token: dict[str, object] = {}
        self.at_endpoint: dict[str, object] = {}
        self.asked: list[str] = []
        self.nonce = ""
        self.renew_key()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def renew_key(self) -> None:
        self._key = ECKey.generate_key("P-256", auto_kid=True)
        self._published = KeySet([self._key])

    def hide_key(self) -> None:
        self._key = ECKey.generate_key("P-256", auto_kid=True)

    def provider(self) -> openid.Provider:
        section = Section(oidc_issuer=self.issuer, oidc_client_id="hivewright")
        return openid.Provider(section)

    def sign_in(self, provider: openid.Provider) -> str:
        """Return the e-mail address that the provider vouches for."""
        _, data = provider.authorization("http://localhost/callback")
        self.nonce = data["nonce"]
        return provider.email(SignIn(b"", None, data), "code", "http://localhost/callback")

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str) -> object:
        if path == "/keys":
            return self._published.as_dict()
        if path == "/userinfo":
            return self.at_endpoint
        if path == "/token":
            return {"access_token": "x", "token_type": "Bearer", "id_token": self._id_token()}
        places = {"jwks_uri": "/keys", "token_endpoint": "/token", "userinfo_endpoint": "/userinfo"}
        urls = {name: self.issuer + place for name, place in places.items()}
        return {"issuer": self.issuer, "authorization_endpoint": f"{self.issuer}/ask", **urls}

    def _id_token(self) -> str:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": "hivewright", "sub": "1", "nonce": self.nonce}
        times = {"iat": now, "exp": now + 60}
        header = {"alg": "ES256", "kid": self._key.kid}
        return jwt.encode(header, claims | times | self.in_token, self._key)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                stand_in.asked.append(self.path)
                body = json.dumps(stand_in._answer(self.path)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def stand_in():
    running = StandIn()
    yield running
    running.close()


def at_provider(visitor: Visitor, email: str, **fields: str) -> str:
    """Sign in at the provider, as its own pages ask for it; return where it sends the browser."""
    place = visitor.to_provider(**fields)
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


def test_invited_person_joins_with_the_provider_and_has_the_nodes(signing) -> None:
    accounts = signing.service.accounts
    secret = invitations.create(accounts.database, 3, time.time() + 60)
    token = signing.service._site.invitations.enrol(secret, "QmInvited1")
    visitor = Visitor(signing.url)
    assert visitor.post("/sign-in/openid", invitation="hwi_wrong").status_code == 403
    visitor.get(at_provider(visitor, ADA, invitation=secret))
    assert visitor.is_signed_in
    assert accounts.caller(token) == ("QmInvited1", accounts.by_email(ADA))


def test_link_of_an_invitation_goes_along_to_the_provider_and_back(signing, tab) -> None:
    """Our policy lets forms go to no other server, and chromium obeys it for redirects too."""
    secret = invitations.create(signing.service.accounts.database, 3, time.time() + 60)
    tab.page.goto(f"{signing.url}/sign-in#invitation={secret}")
    tab.page.get_by_role("button", name="Continue with Test Provider").click()
    tab.page.locator("[name=login]").fill(ADA)
    tab.page.locator("[name=password]").fill("x")
    tab.page.locator("[type=submit]").click()
    tab.page.locator("[type=submit]").click()
    expect(tab.page.get_by_text("0 of 3 nodes, round")).to_be_visible()


def test_address_that_the_provider_has_not_verified_is_refused(signing) -> None:
    visitor = Visitor(signing.url)
    answer = visitor.get(at_provider(visitor, "unverified@example.org"))
    assert answer.status_code == 403
    assert "has not verified" in texts(answer)
    assert not visitor.is_signed_in


def test_address_in_the_identity_token_is_enough(stand_in) -> None:
    provider = stand_in.provider()
    stand_in.in_token = {"email": "Ada@example.org", "email_verified": True}
    assert stand_in.sign_in(provider) == ADA
    stand_in.in_token = {"email": ADA, "email_verified": False}
    with pytest.raises(Refused, match="has not verified"):
        stand_in.sign_in(provider)
    assert "/userinfo" not in stand_in.asked


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"sub": "1", "email": ADA}, "EmailNotVerified"),
        ({"sub": "1", "email": ADA, "email_verified": "yes"}, "EmailNotVerified"),
        ({"sub": "1"}, "EmailMissing"),
        ({"sub": "2", "email": ADA, "email_verified": True}, "IdentityTokenInvalid"),
    ],
)
def test_address_that_is_not_vouched_for_is_refused(stand_in, said, error) -> None:
    stand_in.at_endpoint = said
    with pytest.raises(Refused) as refused:
        stand_in.sign_in(stand_in.provider())
    assert (refused.value.status, refused.value.error) == (403, error)


def test_new_keys_of_the_provider_are_read_once_a_minute(stand_in, monkeypatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(openid.time, "monotonic", lambda: now)
    stand_in.in_token = {"email": ADA, "email_verified": True}
    provider = stand_in.provider()
    assert stand_in.sign_in(provider) == ADA
    stand_in.renew_key()
    now += 60
    assert stand_in.sign_in(provider) == ADA
    # A provider that signs with keys that it does not publish is not asked each time.
    stand_in.hide_key()
    for _ in range(3):
        with pytest.raises(Refused, match="not valid"):
            stand_in.sign_in(provider)
    assert stand_in.asked.count("/keys") == 2


def test_answer_of_another_sign_in_is_refused_and_none_works_twice(signing) -> None:
    """A code that somebody else brings, a state of another browser, and a replay."""
    thief, visitor = Visitor(signing.url), Visitor(signing.url)
    place = at_provider(visitor, ADA)
    thief.to_provider()
    assert thief.get(place).status_code == 400
    assert Visitor(signing.url).get(place).status_code == 400
    wrong = re.sub(r"state=[^&]+", "state=else", place)
    assert visitor.get(wrong).status_code == 400
    assert visitor.get(place).status_code == 200
    assert visitor.is_signed_in
    assert visitor.get(place).status_code == 400


def test_provider_that_failed_is_left_alone_for_ten_seconds(monkeypatch) -> None:
    """So that those who come meanwhile do not wait for it one after the other."""
    asked: list[str] = []

    def fail(url: str) -> None:
        asked.append(url)
        raise requests.ConnectTimeout

    clock = [0.0]
    monkeypatch.setattr(openid, "_read", fail)
    monkeypatch.setattr(openid.time, "monotonic", lambda: clock[0])
    section = Section(oidc_issuer="http://localhost:1", oidc_client_id="hivewright")
    provider = openid.Provider(section)
    for now, num_asked in ((0.0, 1), (9.0, 1), (10.0, 2)):
        clock[0] = now
        with pytest.raises(openid.ProviderFailed, match="ConnectTimeout"):
            provider.authorization("http://localhost/callback")
        assert len(asked) == num_asked


def test_provider_and_mail_server_are_asked_in_threads_of_their_own(
    chain, tmp_path, monkeypatch
) -> None:
    """Nodes' calls go on while one of them does not answer."""
    threads: list[str] = []

    def note(*_: object) -> None:
        threads.append(threading.current_thread().name)
        raise requests.ConnectTimeout if len(threads) == 1 else mail.MailRefused

    monkeypatch.setattr(openid, "_read", note)
    monkeypatch.setattr(mail.Mailer, "send_code", note)
    parsed = hosted(
        chain.settings,
        tmp_path / "account",
        oidc_issuer="http://localhost:1",
        oidc_client_id="hivewright",
        smtp_host="127.0.0.1",
    )
    with serving(parsed) as running:
        visitor = Visitor(running.url)
        assert visitor.post("/sign-in/openid").status_code == 503
        assert visitor.begin(ADA).status_code == 503
    assert [name.rpartition("_")[0] for name in threads] == ["outgoing", "outgoing"]


def test_provider_that_is_down_is_said(chain, tmp_path) -> None:
    parsed = hosted(
        chain.settings,
        tmp_path / "account",
        oidc_issuer="http://localhost:1",
        oidc_client_id="hivewright",
    )
    with serving(parsed) as running:
        answer = Visitor(running.url).post("/sign-in/openid")
        assert answer.status_code == 503
        assert "account.oidc_issuer" in texts(answer)

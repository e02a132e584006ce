"""A node's side of signing in from a terminal, against a server with scripted answers."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import pytest
from account_service import some_identity

from worker import settings
from worker.chain import device_login
from worker.chain.device_login import Begun, DeviceLogin
from worker.chain.enrolment_proof import OLD_PREFIX, Challenge, message, purpose_of_login
from worker.errors import ChainError, ChainUnreachable, IdentityError
from worker.swarm import identity

OFFERED = {
    "device_code": "device",
    "user_code": "ABCD-EFGH",
    "verification_uri": "http://here/device",
    "verification_uri_complete": "http://here/device?code=ABCD-EFGH",
    "expires_in": 600,
    "interval": 2,
}
PENDING = (400, {"error": "authorization_pending"})
SLOWER = (400, {"error": "slow_down"})
TOKEN = (200, {"access_token": "the-token"})


class Scripted(ThreadingHTTPServer):
    """Gives one answer after the other, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, object]] = []
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.server.asked.append((self.path, {key: each[0] for key, each in form.items()}))
        status, answer = self.server.answers.pop(0)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    thread = threading.Thread(target=scripted.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield scripted
    scripted.shutdown()
    scripted.server_close()
    thread.join()


@pytest.fixture
def client(server: Scripted) -> Iterator[DeviceLogin]:
    # A slash at the end of the address is as good as none.
    made = DeviceLogin(server.url + "/", settings.Chain(timeout_seconds=5.0))
    yield made
    made.close()


@pytest.fixture
def node(tmp_path_factory) -> identity.Identity:
    return some_identity(tmp_path_factory.getbasetemp())


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """Return the pauses that were made; none takes time."""
    pauses: list[float] = []
    monkeypatch.setattr(device_login.time, "sleep", pauses.append)
    monkeypatch.setattr(device_login.time, "monotonic", lambda: sum(pauses))
    return pauses


def begun(expires_in: float = 600.0, interval: float = 2.0) -> Begun:
    return Begun("device", "ABCD-EFGH", "page", "page?code", expires_in, interval)


@pytest.mark.parametrize("challenge", [Challenge("sign this", 7, "0x" + "ab" * 20), None])
@pytest.mark.parametrize(("move", "said"), [(False, "no"), (True, "yes")])
def test_node_proves_that_it_has_its_key(server, client, node, move, said, challenge) -> None:
    """Also to a service of the release before, which gives no challenge."""
    server.answers = [(200, OFFERED)]
    assert client.begin(node, "gpu-0", move, challenge) == Begun(
        "device",
        "ABCD-EFGH",
        "http://here/device",
        "http://here/device?code=ABCD-EFGH",
        600.0,
        2.0,
    )
    ((path, form),) = server.asked
    assert path == "/oauth/device_authorization"
    assert (form["name"], form["move"], form["peer_id"]) == ("gpu-0", said, node.peer_id)
    signature = base64.b64decode(form["signature"])
    assert base64.b64decode(form["public_key"]) == node.public_key
    signed = message(node.peer_id, purpose_of_login(move), challenge)
    assert signed.startswith(OLD_PREFIX) is (challenge is None)
    assert identity.verify(node.peer_id, node.public_key, signed, signature)


def test_interval_is_five_seconds_unless_the_server_names_one(server, client, node) -> None:
    server.answers = [(200, {key: OFFERED[key] for key in OFFERED if key != "interval"})]
    assert client.begin(node, "", False, None).interval == 5.0


def test_escapes_of_the_server_do_not_reach_the_terminal(server, client, node) -> None:
    server.answers = [(200, OFFERED | {"user_code": "\x1b[2J", "verification_uri": "a\nb"})]
    offered = client.begin(node, "", False, None)
    assert (offered.user_code, offered.page) == (r"\x1b[2J", r"a\nb")


@pytest.mark.parametrize(
    "changed",
    [{"expires_in": "soon"}, {"expires_in": None}, {"interval": []}, {"device_code": ...}],
)
def test_answer_without_a_code_is_another_service(server, client, node, changed) -> None:
    answer = {key: value for key, value in (OFFERED | changed).items() if value is not ...}
    server.answers = [(200, answer)]
    with pytest.raises(ChainError, match=r"no code in the answer; expected hivewright's account"):
        client.begin(node, "", False, None)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"text"', b"[" * 100_000])
@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.usefixtures("usual_recursion_limit")
def test_answer_without_json_is_another_service(server, client, node, status, body) -> None:
    server.answers = [(status, body)]
    with pytest.raises(ChainError, match=f"HTTP {status} without JSON"):
        client.begin(node, "", False, None)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"error": "invalid_grant", "error_description": "the code was used"}, "the code was used"),
        ({"error": "access_denied"}, "access_denied"),
        ({}, "no sign-in here"),
        ({"error": "\x1b[31mred"}, r"\x1b[31mred"),
        ({"error": "x" * 500}, "x" * 400),
    ],
)
def test_refusal_is_shown_at_both_steps(server, client, node, slept, answer, shown) -> None:
    server.answers = [(400, answer), (400, answer)]
    for step in (lambda: client.begin(node, "", False, None), lambda: client.wait(begun())):
        with pytest.raises(IdentityError) as refusal:
            step()
        assert str(refusal.value) == f"{server.url}: sign-in refused: {shown}"


def test_node_asks_until_its_person_has_allowed_it(server, client, slept) -> None:
    server.answers = [PENDING, SLOWER, PENDING, SLOWER, TOKEN]
    assert client.wait(begun()) == "the-token"
    assert slept == [2.0, 2.0, 7.0, 7.0, 12.0]
    assert {path for path, _ in server.asked} == {"/oauth/token"}
    assert all(form["device_code"] == "device" for _, form in server.asked)


def test_node_waits_a_minute_at_most_between_two_questions(server, client, slept) -> None:
    server.answers = [TOKEN]
    client.wait(begun(interval=3600.0))
    assert slept == [60.0]


def test_code_that_nobody_types_ends_the_sign_in(server, client, slept) -> None:
    server.answers = [PENDING] * 3
    with pytest.raises(IdentityError, match=r"nobody typed ABCD-EFGH within 5 s; run"):
        client.wait(begun(expires_in=5.0))
    assert slept == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("token", [None, 7, ["x"]])
def test_token_of_another_type_is_a_refusal(server, client, slept, token) -> None:
    server.answers = [(200, {"access_token": token})]
    with pytest.raises(IdentityError, match="sign-in refused: no sign-in here"):
        client.wait(begun())


def test_service_that_is_away_is_an_outage(server, client, node) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(ChainUnreachable):
        client.begin(node, "", False, None)


def test_node_waits_for_a_service_that_is_upgraded(server, client, slept) -> None:
    server.answers = [PENDING, (502, b"<html>"), (503, {"error": "ChainUnreachable"}), TOKEN]
    assert client.wait(begun()) == "the-token"
    assert len(slept) == 4


def test_service_that_stays_away_is_an_outage_when_the_code_ends(server, client, slept) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(ChainUnreachable):
        client.wait(begun(expires_in=5.0))
    assert len(slept) == 3

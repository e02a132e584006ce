"""Requests that no browser and no node sends: answered with a refusal, never with a failure."""

import http.client
import json
import logging
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.account.hosting import HOST
from tests.account.people import ADA, signed_in
from tests.account.visitor import Visitor

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
HOSTILE = (
    b"\xff\xfe",
    b"\xed\xa0\x80",  # half a character
    b"Qm\x80.abc",
    b"'; DROP TABLE accounts; --",
    b"." * 3000,
    "\u202egpu".encode(),
)


def ask(
    url: str, method: str, path: str, headers: dict[str, str | bytes], body: bytes = b""
) -> tuple[int, bytes]:
    """Send a request whose headers may be any bytes."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.putrequest(method, path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def no_failures(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if the service logs an exception."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.usefixtures("no_failures")
def test_headers_of_any_bytes_are_refused(service) -> None:
    for value in HOSTILE:
        for path, body in (
            ("/rpc", b'{"jsonrpc": "2.0", "method": "eth_chainId"}'),
            ("/api/register-peer", b'{"orgId": "x", "peerId": "QmQmQmQmQmQmQmQmQm"}'),
        ):
            headers = {**JSON, "Authorization": b"Bearer " + value}
            status, _ = ask(service.url, "POST", path, headers, body)
            assert 400 <= status < 500, (path, value)
        for name in ("Cookie", "X-Forwarded-For", "Accept-Language", "Tailscale-User-Login"):
            cookie = b"session=" + value + b"; hivewright-session=" + value
            status, _ = ask(service.url, "GET", "/", {name: cookie if name == "Cookie" else value})
            assert status < 500, (name, value)


_BODIES = [
    b"",
    b"null",
    b"[]",
    b"7",
    b'"\\ud800"',
    b'{"peerId": "\\ud800"}',
    b'{"orgId": "\\u0000", "peerId": "QmQmQmQmQmQmQmQmQm"}',
    b'{"orgId": "\\ud83d", "peerId": "QmQmQmQmQmQmQmQmQm"}',
    b"\xff\xff",
    b"[" * 5000,
    b'{"orgId": ' + b"9" * 5000 + b"}",
    json.dumps({"orgId": "hivewright", "peerId": "Qm" * 10, "roundNumber": 2**63}).encode(),
    json.dumps({"peerId": "Qm" * 10, "to": "0x" + "0" * 40, "signature": "0" * 130}).encode(),
    b'{"csrf": "\\ud800", "id": "\\ud800", "response": {}}',
]
_PATHS = [
    "/api/enrol",
    "/api/register-peer",
    "/api/submit-reward",
    "/api/submit-winner",
    "/api/bet-token-balance",
    "/api/guess-answer",
    "/api/claim-reward",
    "/api/release-peer",
    "/api/take-peer",
    "/rpc",
    "/oauth/device_authorization",
    "/oauth/token",
    "/passkeys/begin",
    "/passkeys/begin-adding",
    "/passkeys/add",
    "/passkeys/sign-in",
    "/nowhere",
]
_FORMS = [
    "/sign-in/email",
    "/sign-in/code",
    "/sign-in/tailscale",
    "/sign-in/openid",
    "/sign-out",
    "/device",
    "/device/allow",
    "/oauth/device_authorization",
    "/oauth/token",
    "/nodes/rename",
    "/nodes/revoke",
    "/nodes/unlink",
    "/nodes/release",
    "/nodes/take",
    "/nodes/keep",
    "/invitations/create",
    "/invitations/withdraw",
    "/settings/export",
    "/settings/delete",
    "/passkeys/remove",
    "/host/quota",
    "/host/suspend",
    "/host/invite",
]
_TEXTS = [b"", b"%ED%A0%80", b"%FF", b"%00", b"-1", b"9" * 5000, b"1e999", b"a%0D%0AX: y"]
_NAMES = [
    "email",
    "code",
    "address",
    "password",
    "name",
    "peer",
    "peer_id",
    "to",
    "account",
    "next",
]
_NAMES += ["suspend", "answer", "invitation", "nodes", "most", "days", "hash", "credential", "move"]
_NAMES += ["device_code", "grant_type", "public_key", "signature", "everywhere"]


@pytest.mark.usefixtures("no_failures")
def test_bodies_of_any_form_are_refused(service) -> None:
    own = {**JSON, "Origin": service.url, "Sec-Fetch-Site": "same-origin"}
    for path in _PATHS:
        for body in _BODIES:
            for headers in (JSON, own):
                status, _ = ask(service.url, "POST", path, headers, body)
                assert 400 <= status < 500, (path, body[:60], status)


@pytest.mark.usefixtures("no_failures")
def test_forms_with_any_text_are_refused(service) -> None:
    """Of a visitor without a session, of a person, and of the host."""
    anybody = Visitor(service.url)
    for visitor in (anybody, signed_in(service, ADA), signed_in(service, HOST)):
        cookies = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
        shown = visitor.get("/").text
        csrf = re.search(r'name="csrf" value="([0-9a-f]+)"', shown)
        own = {
            **FORM,
            "User-Agent": "Mozilla/5.0 (test)",
            "Origin": service.url,
            "Sec-Fetch-Site": "same-origin",
            "Cookie": cookies,
        }
        for path in _FORMS:
            if path in ("/sign-out", "/settings/delete", "/sign-in/email"):
                continue  # would end the session, or use up the visitor's mails
            for text in _TEXTS:
                fields = [name.encode() + b"=" + text for name in _NAMES]
                fields.append(b"csrf=" + (csrf[1].encode() if csrf else text))
                status, _ = ask(service.url, "POST", path, own, b"&".join(fields))
                assert status < 500, (path, text[:20], status)


@pytest.mark.usefixtures("no_failures")
def test_addresses_of_pages_with_any_text_are_answered(service) -> None:
    for path in ("/sign-in?next=", "/device?user_code=", "/api/get-api-key-status?orgId=", "/"):
        for text in ("%ED%A0%80", "%FF", "%00", "a" * 5000, "%0D%0A", "%F0%9F%98%80", "<script>"):
            status, _ = ask(service.url, "GET", path + text.replace("<", "%3C"), {})
            assert status < 500, (path, text[:20])

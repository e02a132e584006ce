import re
import socket
import time

import pytest
import requests
from account_service import serving
from aiosmtpd.controller import Controller

from tests.account.hosting import HOST, hosted
from tests.account.people import ADA, BOB, code_of, signed_in
from tests.account.visitor import FORM, Visitor, texts
from worker.account import sessions, sign_in_pages


class Mailbox:
    """The handler of a real SMTP server."""

    def __init__(self) -> None:
        self.messages: list[tuple[list[str], str]] = []

    async def handle_DATA(self, server, session, envelope) -> str:
        self.messages.append((envelope.rcpt_tos, envelope.content.decode()))
        return "250 OK"

    def code(self) -> str:
        return re.search(r"^(\d{8})\r?$", self.messages[-1][1], re.MULTILINE)[1]


@pytest.fixture
def mailbox():
    box = Mailbox()
    with socket.create_server(("127.0.0.1", 0)) as free:
        box.port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=box.port)
    controller.start()
    yield box
    controller.stop()


@pytest.fixture
def mailing(chain, tmp_path, mailbox):
    parsed = hosted(
        chain.settings,
        tmp_path / "account",
        smtp_host="127.0.0.1",
        smtp_port=mailbox.port,
        smtp_security="none",
        smtp_from="swarm@example.org",
    )
    with serving(parsed) as running:
        yield running


# ---- by e-mail


def test_code_by_mail_signs_in_to_the_same_account_each_time(mailing, mailbox) -> None:
    addresses = []
    for email in (ADA, " ADA@Example.org "):
        visitor = Visitor(mailing.url)
        assert "was sent to" in texts(visitor.begin(email))
        assert mailbox.messages[-1][0] == [ADA]
        assert "My nodes" in texts(visitor.answer(mailbox.code()))
        addresses.append(re.search("0x[0-9a-fA-F]{40}", visitor.get("/").text)[0])
    assert addresses[0] == addresses[1]
    assert mailing.service.accounts.by_email(ADA).address == addresses[0]


def test_without_a_mail_server_the_host_gives_the_code(service) -> None:
    visitor = Visitor(service.url)
    assert f"hivewright account code {ADA}" in texts(visitor.begin(ADA))
    assert not visitor.is_signed_in
    assert "not the code" in texts(visitor.answer("00000000"))
    visitor.answer(code_of(service, ADA))
    assert visitor.is_signed_in


def test_code_is_good_once_and_in_its_own_browser_only(mailing, mailbox) -> None:
    visitor = Visitor(mailing.url)
    visitor.begin(ADA)
    code = mailbox.code()
    thief = Visitor(mailing.url)
    thief.begin(ADA)
    assert "not the code" in texts(thief.answer(code))
    visitor.answer(code)
    assert visitor.is_signed_in
    visitor.post("/sign-out", csrf=visitor.csrf("/"))
    assert "begin it again" in texts(visitor.answer(code))
    assert not visitor.is_signed_in


def test_code_expires(service, monkeypatch) -> None:
    visitor = Visitor(service.url)
    visitor.begin(ADA)
    code = code_of(service, ADA)
    now = time.time()
    monkeypatch.setattr(sessions.time, "time", lambda: now + sessions.SIGN_IN_SECONDS + 1)
    assert visitor.answer(code).status_code == 400


def test_guesses_get_nowhere_and_the_owner_gets_in_meanwhile(mailing, mailbox) -> None:
    owner = Visitor(mailing.url)
    owner.begin(ADA)
    code = mailbox.code()
    thief = Visitor(mailing.url)
    thief.begin(ADA)
    statuses = [thief.answer(f"{guess:08}").status_code for guess in range(20)]
    assert statuses == [403] * 5 + [429] * 15
    thief.answer(mailbox.code())
    assert not thief.is_signed_in
    owner.answer(code)
    assert owner.is_signed_in


def test_sign_ins_from_one_address_are_limited(service) -> None:
    statuses = {
        Visitor(service.url).begin(f"x{number}@example.org").status_code for number in range(25)
    }
    assert statuses == {200, 429}


def test_mails_to_one_address_are_limited(mailing, mailbox) -> None:
    statuses = [Visitor(mailing.url).begin(ADA).status_code for _ in range(8)]
    assert statuses == [200] * 5 + [429] * 3
    assert len(mailbox.messages) == 5


def test_mail_names_no_page_that_the_request_did(mailing, mailbox) -> None:
    """Somebody could have our mail server send people to a page of theirs."""
    port = mailing.url.rpartition(":")[2]
    elsewhere = f"192.0.2.66:{port}"
    visitor = Visitor(mailing.url)
    answer = visitor.send(
        "POST",
        "/sign-in/email",
        fields={"email": ADA},
        follow=False,
        **{"Host": elsewhere, "Origin": f"http://{elsewhere}", "Content-Type": FORM},
    )
    assert answer.status_code == 303
    assert "192.0.2.66" not in mailbox.messages[-1][1]
    assert "http" not in mailbox.messages[-1][1]


def test_mail_server_that_is_down_is_said(chain, tmp_path) -> None:
    parsed = hosted(chain.settings, tmp_path / "account", smtp_host="127.0.0.1", smtp_port=1)
    with serving(parsed) as running:
        answer = Visitor(running.url).begin(ADA)
        assert answer.status_code == 503
        assert "could not be sent" in texts(answer)


@pytest.mark.parametrize("email", ["", "ada", "a@b@c", "ada@example.org\nBcc: x@y", "x" * 300])
def test_bad_address_is_refused(mailing, mailbox, email) -> None:
    answer = Visitor(mailing.url).begin(email)
    assert answer.status_code == 400
    assert mailbox.messages == []


# ---- sessions


def test_session_is_new_after_each_sign_in(service) -> None:
    """A cookie that somebody put into the browser before is worth nothing."""
    visitor = Visitor(service.url)
    visitor.cookies["hivewright_session"] = "fixed"
    visitor.begin(ADA)
    visitor.answer(code_of(service, ADA))
    first = visitor.cookies["hivewright_session"]
    assert first not in (None, "fixed")
    visitor.begin(ADA)
    visitor.answer(code_of(service, ADA))
    old = Visitor(service.url)
    old.cookies["hivewright_session"] = first
    assert not old.is_signed_in


def test_cookie_is_for_this_server_and_no_script(service) -> None:
    visitor = Visitor(service.url)
    visitor.begin(ADA)
    code = code_of(service, ADA)
    header = visitor.post("/sign-in/code", follow=False, code=code).headers["Set-Cookie"]
    for part in ("HttpOnly", "Secure", "SameSite=Lax", "Path=/"):
        assert part in header
    assert "Domain" not in header


def test_sign_out_everywhere_ends_all_sessions(service) -> None:
    here, there = signed_in(service), signed_in(service)
    bob = signed_in(service, BOB)
    here.submit("/sign-out", everywhere="yes")
    assert not here.is_signed_in
    assert not there.is_signed_in
    assert bob.is_signed_in


def test_session_of_a_deleted_account_is_over(service) -> None:
    visitor = signed_in(service)
    service.service.accounts.delete(service.service.accounts.by_email(ADA))
    assert not visitor.is_signed_in


def test_only_hashes_of_cookies_and_codes_are_stored(service) -> None:
    visitor = signed_in(service)
    cookie = visitor.cookies["hivewright_session"]
    folder = service.service._settings.account.state_dir
    stored = b"".join(file.read_bytes() for file in folder.glob("accounts.db*"))
    assert cookie.encode() not in stored
    assert b"12345678" not in stored


def test_person_who_is_no_operator_any_more_is_out(chain, tmp_path) -> None:
    """The session was of the operator's account, which it does not show again."""
    folder = tmp_path / "account"
    with serving(hosted(chain.settings, folder)) as running:
        host = signed_in(running, HOST)
        assert host.get("/host").status_code == 200
    with serving(hosted(chain.settings, folder, operators=["else@example.org"])) as running:
        host.url = running.url
        assert not host.is_signed_in
        assert host.get("/host", follow=False).headers["Location"] == "/sign-in"
    with serving(hosted(chain.settings, folder)) as running:
        host.url = running.url
        assert host.is_signed_in


def test_session_works_on_a_private_connection_only(chain, tmp_path) -> None:
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as running:
        visitor = signed_in(running)
        assert visitor.get("/settings", **{"X-Forwarded-For": "203.0.113.7"}).status_code == 403
        assert visitor.get("/settings", **{"X-Forwarded-For": "100.64.0.9"}).status_code == 200


def test_where_a_sign_in_leads_is_a_page_of_ours(service) -> None:
    for following, code, place in (
        ("device", 'A&next=/x#y"<', "/device?code=A%26next%3D%2Fx%23y%22%3C"),
        ("//evil.example", "", "/"),
        ("https://evil.exampl", "", "/"),
    ):
        visitor = Visitor(service.url)
        visitor.begin(ADA, next=following, code=code)
        typed = code_of(service, ADA)
        answer = visitor.post("/sign-in/code", follow=False, code=typed)
        assert answer.headers["Location"] == place


# ---- /rpc


def rpc(service, visitor: Visitor, **headers: str) -> int:
    cookies = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    return requests.post(
        service.url + "/rpc",
        json={"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []},
        headers=visitor.headers | headers | {"Cookie": cookies},
        timeout=20,
    ).status_code


def test_chain_is_read_with_a_session_or_a_token_only(chain, tmp_path) -> None:
    """Whoever asks, from wherever: also from loopback and the tailnet."""
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as running:
        nobody, ada = Visitor(running.url), signed_in(running)
        own = {"Origin": running.url}
        for client in ("203.0.113.7", "100.64.0.9", "127.0.0.1"):
            assert rpc(running, nobody, **own, **{"X-Forwarded-For": client}) == 401
        assert rpc(running, ada, **own) == 200
        assert rpc(running, ada) == 401  # no page of ours
        assert rpc(running, ada, Origin="http://evil.example") == 403
        assert rpc(running, ada, **own, **{"Sec-Fetch-Site": "cross-site"}) == 403
        assert rpc(running, ada, **own, **{"X-Forwarded-For": "203.0.113.7"}) == 403
        accounts = running.service.accounts
        account = accounts.by_email(ADA)
        token = accounts.link(account, "QmAda1")
        bearer = {"Authorization": f"Bearer {token}"}
        assert rpc(running, nobody, **bearer) == 200
        accounts.set_suspended(account.id, True)
        assert rpc(running, ada, **own) == 403
        assert rpc(running, nobody, **bearer) == 403


# ---- requests of others


def test_form_of_another_site_or_session_is_refused(service) -> None:
    visitor, other = signed_in(service), signed_in(service, BOB)
    own, form = visitor.csrf("/"), {"Content-Type": FORM}
    foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    cases = [
        ({"csrf": own}, foreign),
        ({"csrf": own}, {}),
        ({"csrf": own}, {"Origin": "null"}),
        ({"csrf": other.csrf("/")}, {"Origin": service.url}),
        ({"csrf": ""}, {"Origin": service.url}),
        ({}, {"Origin": service.url}),
    ]
    for fields, headers in cases:
        answer = visitor.send("POST", "/sign-out", fields=fields, **headers, **form)
        assert answer.status_code == 403, (fields, headers)
    assert visitor.is_signed_in


def test_page_that_came_without_https_sends_nothing_to_one_with(chain, tmp_path) -> None:
    """Somebody on the way could have changed it."""
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as running:
        visitor = Visitor(running.url, **PROXY)
        assert visitor.begin(ADA).status_code == 200
        plain = {"Origin": running.url, "Content-Type": FORM}
        for path in ("/sign-in/email", "/passkeys/begin"):
            assert visitor.send("POST", path, fields={"email": ADA}, **plain).status_code == 403


@pytest.mark.parametrize(
    ("dashboard", "scheme", "is_told"),
    [
        (None, "https", True),
        (None, "http", False),
        ("https://127.0.0.1:8443", "https", True),
        ("http://dashboard.example:3001", "https", True),
        ("http://127.0.0.1:3001", "https", False),
    ],
)
def test_browsers_that_came_by_https_are_told_to_use_it(
    chain, tmp_path, dashboard, scheme, is_told
) -> None:
    """But not if they could no longer open the dashboard."""
    changes = {"behind_proxy": True, "dashboard_url": dashboard}
    with serving(hosted(chain.settings, tmp_path / "account", **changes)) as running:
        visitor = Visitor(running.url, **PROXY | {"X-Forwarded-Proto": scheme})
        for path in ("/sign-in", "/nothing", "/page.css", "/api/swarm"):
            headers = visitor.get(path).headers
            assert ("Strict-Transport-Security" in headers) == is_told, path


def test_cookies_end_as_they_were_set(chain, tmp_path) -> None:
    """Browsers ignore what would end a `__Host-` cookie without `Secure`."""
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as running:
        visitor = signed_in(running, **PROXY)
        answer = visitor.submit("/sign-out", follow=False)
        header = answer.headers["Set-Cookie"]
        assert header.startswith("__Host-hivewright_session=")
        for part in ("Max-Age=0", "HttpOnly", "Secure", "SameSite=Lax", "Path=/"):
            assert part in header


def test_page_under_a_foreign_name_is_refused(service) -> None:
    """A name that somebody points to us, to use the visitor's browser."""
    answer = requests.get(
        service.url + "/sign-in",
        headers={"Host": "evil.example", "User-Agent": "Mozilla/5.0"},
        timeout=20,
    )
    assert answer.status_code == 421


@pytest.mark.parametrize("path", ["/sign-in", "/", "/page.js", "/nothing", "/api/swarm"])
def test_every_answer_has_the_security_headers(service, path) -> None:
    headers = requests.get(service.url + path, timeout=20).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] in ("same-origin", "no-referrer")


def test_no_page_refers_to_another_server(service) -> None:
    visitor = signed_in(service)
    for path in (
        "/",
        "/transactions",
        "/settings",
        "/device",
        "/base.css",
        "/page.css",
        "/page.js",
    ):
        assert "http" not in visitor.get(path).text


def test_oversize_form_is_refused(service) -> None:
    answer = Visitor(service.url).post("/sign-in/email", email="x" * 1_000_000)
    assert answer.status_code == 413


def test_what_people_type_is_escaped(service) -> None:
    visitor = signed_in(service)
    account = service.service.accounts.by_email(ADA)
    service.service.accounts.link(account, "QmAda1", "plain")
    visitor.submit("/nodes/rename", peer="QmAda1", name="<script>alert(1)</script>")
    page = visitor.get("/").text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


# ---- from elsewhere


def behind_tailscale(chain, tmp_path, **changes):
    changes = {"behind_proxy": True, "tailscale_login": True} | changes
    return hosted(chain.settings, tmp_path / "account", **changes)


PROXY = {"X-Forwarded-For": "100.64.0.9", "X-Forwarded-Proto": "https"}


def test_tailscale_signs_in_the_person_that_it_names(chain, tmp_path) -> None:
    with serving(behind_tailscale(chain, tmp_path)) as running:
        visitor = Visitor(running.url, **PROXY, **{"Tailscale-User-Login": ADA})
        assert f"Continue as {ADA}" in texts(visitor.get("/sign-in"))
        answer = visitor.post("/sign-in/tailscale", follow=False)
        assert answer.headers["Set-Cookie"].startswith("__Host-hivewright_session=")
        assert running.service.accounts.by_email(ADA) is not None


def test_sign_ins_by_tailscale_are_limited(chain, tmp_path) -> None:
    """Each writes a session."""
    with serving(behind_tailscale(chain, tmp_path)) as running:
        statuses = [
            Visitor(running.url, **PROXY, **{"Tailscale-User-Login": ADA})
            .post("/sign-in/tailscale", follow=False)
            .status_code
            for _ in range(22)
        ]
    assert statuses == [303] * 20 + [429] * 2


@pytest.mark.parametrize("who", ["not root", "not set", "no name", "a machine"])
def test_tailscale_header_of_somebody_else_is_not_believed(
    chain, tmp_path, monkeypatch, who
) -> None:
    parsed = behind_tailscale(
        chain, tmp_path, **({"tailscale_login": False} if who == "not set" else {})
    )
    if who == "not root":
        monkeypatch.setattr(sign_in_pages, "owner_of", lambda peer, own: 998)
    names = {"no name": {}, "a machine": {"Tailscale-User-Login": "tagged-devices"}}
    with serving(parsed) as running:
        visitor = Visitor(running.url, **PROXY, **names.get(who, {"Tailscale-User-Login": ADA}))
        assert "Continue as" not in texts(visitor.get("/sign-in"))
        assert visitor.post("/sign-in/tailscale").status_code == 403
        assert running.service.accounts.by_email(ADA) is None


@pytest.mark.parametrize(
    ("client", "scheme", "status"),
    [
        ("203.0.113.7", "http", 403),
        ("203.0.113.7", "https", 200),
        ("100.64.0.9", "http", 200),
        ("192.168.1.7", "http", 403),
    ],
)
def test_signing_in_needs_a_private_connection(chain, tmp_path, client, scheme, status) -> None:
    with serving(hosted(chain.settings, tmp_path / "account", behind_proxy=True)) as running:
        visitor = Visitor(running.url, **{"X-Forwarded-For": client, "X-Forwarded-Proto": scheme})
        answer = visitor.get("/sign-in")
        assert answer.status_code == status
        assert ("needs HTTPS" in texts(answer)) == (status == 403)


# ---- invitations


def test_new_account_needs_an_invitation_where_the_host_says_so(chain, tmp_path) -> None:
    from worker.account import invitations

    parsed = hosted(chain.settings, tmp_path / "account", sign_up="invitation")
    with serving(parsed) as running:
        visitor = Visitor(running.url)
        visitor.begin(ADA)
        answer = visitor.answer(code_of(running, ADA))
        assert "needs an invitation" in texts(answer)
        database = running.service.accounts.database
        secret = invitations.create(database, 3, time.time() + 60)
        assert visitor.begin(ADA, invitation="hwi_wrong").status_code == 403
        visitor.begin(ADA, invitation=secret)
        visitor.answer(code_of(running, ADA))
        assert visitor.is_signed_in
        assert running.service.accounts.by_email(ADA).max_nodes == 3
        bob = Visitor(running.url)
        bob.begin(BOB, invitation=secret)
        assert "somebody else" in texts(bob.answer(code_of(running, BOB)))
        assert not bob.is_signed_in


def test_service_without_a_passphrase_has_no_pages(chain, tmp_path) -> None:
    parsed = hosted(chain.settings, tmp_path / "account", passphrase_file=None)
    with serving(parsed) as running:
        assert requests.get(running.url + "/sign-in", timeout=20).status_code == 404
        assert requests.get(running.url + "/api/swarm", timeout=20).status_code == 200

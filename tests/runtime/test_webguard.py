"""Clients that keep a server's connections busy, and web pages that make browsers send requests."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import requests
from aiohttp import web

from worker.runtime import webguard


@pytest.fixture(autouse=True)
def impatience(monkeypatch) -> None:
    monkeypatch.setattr(webguard, "HEAD_SECONDS", 0.6)
    monkeypatch.setattr(webguard, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(webguard, "BUSY_SECONDS", 2.0)
    monkeypatch.setattr(webguard, "_SWEEP_SECONDS", 0.05)
    # As if nothing had been logged yet.
    monkeypatch.setattr(webguard._BAD_REQUESTS, "_said_at", -webguard._LOG_SECONDS)


@pytest.fixture
def port() -> Iterator[int]:
    """Run a guarded server that echoes bodies and answers GET /large with 32 MB; yield the port."""

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(1.5)
        return web.Response()

    async def large(request: web.Request) -> web.Response:
        return web.Response(body=bytes(32_000_000))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    application = web.Application()
    application.router.add_post("/", echo)
    application.router.add_get("/", echo)
    application.router.add_get("/large", large)
    application.router.add_get("/slow", slow)
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    starting = webguard.serve(application, [listening], ("swarm.example.org",))
    end = asyncio.run_coroutine_threadsafe(starting, loop).result(10)
    yield listening.getsockname()[1]
    asyncio.run_coroutine_threadsafe(end(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def connected(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(sent)
    return connection


def seconds_until_closed(connection: socket.socket, trickle: bytes = b"") -> float:
    """How long the server keeps it, while we send a byte every now and then."""
    began = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - began < 8:
        try:
            if trickle:
                connection.sendall(trickle)
            if not connection.recv(65536):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


HEAD = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "trickle", "most"),
    [
        pytest.param(b"", b"", 2.5, id="nothing"),
        pytest.param(b"POST / HT", b"", 2.5, id="half a head"),
        pytest.param(HEAD, b"X-A: b\r\n", 2.5, id="slow headers"),
        pytest.param(HEAD + b"Content-Length: 999\r\n\r\n", b"x", 5.0, id="slow body"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"", 3.5, id="idle keep-alive"),
    ],
)
def test_slow_client_is_let_go_and_others_are_served_meanwhile(port, sent, trickle, most) -> None:
    with connected(port, sent) as connection:
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
        assert seconds_until_closed(connection, trickle) < most


def test_client_that_reads_no_answer_is_let_go(port) -> None:
    with connected(port, b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as connection:
        time.sleep(4)
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            received = 0
            while piece := connection.recv(1 << 20):
                received += len(piece)
            assert received < 32_000_000


def test_more_than_enough_half_open_connections_keep_nobody_out(port, monkeypatch, caplog) -> None:
    monkeypatch.setattr(webguard, "MAX_CONNECTIONS", 50)
    monkeypatch.setattr(webguard, "HEAD_SECONDS", 30.0)
    with contextlib.ExitStack() as stack, caplog.at_level(logging.WARNING):
        for _ in range(150):
            stack.enter_context(connected(port, b"GET / HTTP/1.1\r\n"))
        for _ in range(5):
            assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
    assert len(caplog.messages) == 1  # one a minute, however many are closed


def fill(port: int, stack: contextlib.ExitStack, count: int, sent: bytes) -> list[socket.socket]:
    return [stack.enter_context(connected(port, sent)) for _ in range(count)]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(HEAD + b"Content-Length: 999\r\n\r\nx", id="trickled bodies"),
        pytest.param(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n", id="unread answers"),
    ],
)
def test_clients_that_keep_the_server_waiting_make_room_for_others(port, monkeypatch, sent) -> None:
    monkeypatch.setattr(webguard, "MAX_CONNECTIONS", 10)
    monkeypatch.setattr(webguard, "BUSY_SECONDS", 60.0)
    with contextlib.ExitStack() as stack:
        fill(port, stack, 15, sent)
        for _ in range(5):
            assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200


def test_requests_at_work_are_not_given_up_for_others(port, monkeypatch) -> None:
    monkeypatch.setattr(webguard, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(webguard, "BUSY_SECONDS", 60.0)
    asked = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
    with contextlib.ExitStack() as stack:
        at_work = fill(port, stack, 3, asked)
        time.sleep(0.3)
        for other in fill(port, stack, 3, b""):
            assert seconds_until_closed(other) < 0.5
        for each in at_work:
            assert each.recv(64).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1", "fe80::1"),
        ("::1", "::1"),
        ("somewhere", "somewhere"),
    ],
)
def test_all_addresses_that_one_host_may_have_count_as_one(address, source) -> None:
    assert webguard.source_of(address) == source
    assert webguard.is_loopback(webguard.source_of("::ffff:127.0.0.1"))


def test_unreadable_requests_are_logged_once_a_minute_without_traceback(port, caplog) -> None:
    for _ in range(20):
        with connected(port, b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n") as connection:
            assert connection.recv(64).startswith(b"HTTP/1.0 400")
    (said,) = [record for record in caplog.records if record.name == "aiohttp.server"]
    assert said.exc_info is None
    assert "127.0.0.1: " in said.getMessage()


def test_requests_sent_ahead_without_end_close_the_connection(port, monkeypatch) -> None:
    monkeypatch.setattr(webguard, "MAX_AHEAD_BYTES", 100_000)
    connection = connected(port, HEAD + b"Content-Length: 9\r\n\r\n")
    ahead = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000
    with connection:
        assert seconds_until_closed(connection, ahead) < 1.5


def ask(port: int, method: str = "GET", **headers: str) -> int:
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(
        method, f"http://127.0.0.1:{port}/", headers=found, timeout=5
    ).status_code


def test_every_answer_has_the_security_headers(port) -> None:
    for path in ("/", "/nothing"):
        answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=5)
        assert {name: answer.headers.get(name) for name in webguard.HEADERS} == webguard.HEADERS


def test_pages_of_others_are_refused_and_clients_that_are_no_browsers_are_not(port) -> None:
    json = {"Content_Type": "application/json"}
    own = f"127.0.0.1:{port}"
    assert ask(port, "POST", **json) == 200
    assert ask(port, "POST", **json, Host="coordinator.of.somebody") == 200  # a node: no browser
    # A name that somebody lets point here (DNS rebinding), whichever header gives the browser away.
    for given in (
        {"Origin": "http://evil.example"},
        {"Accept_Language": "de"},
        {"User_Agent": "Mozilla/5.0"},
    ):
        assert ask(port, Host="evil.example", **given) == 421
    for host in (
        own,
        "coordinator:3000",
        "coordinator.ts.net",
        "swarm.example.org:80",
        "[::1]:3000",
    ):
        assert ask(port, Host=host, Accept_Language="de") == 200
    # Another page's request to our address.
    assert ask(port, "POST", **json, Origin="http://evil.example") == 403
    assert ask(port, "POST", **json, Origin="null") == 403
    assert ask(port, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 403
    assert (
        ask(port, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate") == 200
    )  # a link to the page
    assert ask(port, "POST", **json, Origin=f"http://{own}") == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_forms_and_plain_text_are_refused(port, content_type) -> None:
    assert ask(port, "POST", Content_Type=content_type) == 415


def test_out_of_files_is_logged_once_a_minute(caplog) -> None:
    only = webguard._OncePerMinute(webguard._is_out_of_files)
    record = logging.LogRecord(
        "asyncio", 40, "", 0, "socket.accept() out of system resource", None, None
    )
    assert [only.filter(record) for _ in range(3)] == [True, False, False]
    assert only.filter(logging.LogRecord("asyncio", 40, "", 0, "something else", None, None))

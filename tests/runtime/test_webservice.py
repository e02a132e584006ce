"""A role that answers HTTP: its addresses, its orderly end, and what stops it from starting."""

import asyncio
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import requests
from aiohttp import web

from worker.errors import ResourceError
from worker.runtime import webservice
from worker.settings import Dashboard


class Greeting:
    """Answers "hello", and reports its URL and its end."""

    def __init__(self, events: Connection) -> None:
        self._events = events

    def application(self) -> web.Application:
        async def greet(request: web.Request) -> web.Response:
            return web.Response(text="hello")

        application = web.Application()
        application.router.add_get("/", greet)
        return application

    def started(self, url: str) -> None:
        self._events.send(url)

    async def tend(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self._events.send("ended")


class Failing(Greeting):
    """Its background work fails at once."""

    async def tend(self) -> None:
        raise ValueError("a mistake in the background")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def section(folder: Path, host: str = "127.0.0.1", port: int | None = None) -> Dashboard:
    return Dashboard(host=host, port=port or free_port(), state_dir=folder / "dashboard")


def _run(dashboard: Dashboard, make: Callable[[Connection], Greeting], events: Connection) -> None:
    try:
        webservice.run("dashboard", dashboard, lambda: make(events))
    except Exception as error:  # noqa: BLE001 - the test looks at any
        events.send(error)
        os._exit(1)
    os._exit(0)


class Running:
    """The process of a service, and what it reports."""

    def __init__(
        self, dashboard: Dashboard, make: Callable[[Connection], Greeting] = Greeting
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._events, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(dashboard, make, theirs), daemon=True)
        self.process.start()

    def event(self) -> object:
        assert self._events.poll(30)
        return self._events.recv()

    def end(self, number: int = signal.SIGTERM) -> int | None:
        os.kill(self.process.pid or 0, number)
        self.process.join(30)
        return self.process.exitcode


@contextmanager
def running(dashboard: Dashboard) -> Iterator[Running]:
    service = Running(dashboard)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.join(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_service_answers_at_its_address_until_a_signal(tmp_path: Path, number: int) -> None:
    dashboard = section(tmp_path)
    with running(dashboard) as service:
        url = f"http://127.0.0.1:{dashboard.port}"
        assert service.event() == url
        assert (dashboard.state_dir / "address").read_text() == f"{url}\n"
        assert requests.get(url, timeout=10).text == "hello"
        assert service.end(number) == 0
        assert service.event() == "ended"
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=1)


def test_service_on_another_address_answers_on_loopback_too(tmp_path: Path) -> None:
    dashboard = section(tmp_path, host="127.0.0.2")
    with running(dashboard) as service:
        assert service.event() == f"http://127.0.0.2:{dashboard.port}"
        for host in ("127.0.0.1", "127.0.0.2"):
            assert requests.get(f"http://{host}:{dashboard.port}", timeout=10).text == "hello"


def test_two_services_do_not_share_a_folder(tmp_path: Path) -> None:
    with running(section(tmp_path)) as first:
        first.event()
        error = Running(section(tmp_path)).event()
    assert isinstance(error, ResourceError)
    assert "dashboard.state_dir" in str(error)


def test_port_in_use_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dashboard = section(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match=r"dashboard\.port"):
            webservice.run("dashboard", dashboard, lambda: Greeting(None))  # type: ignore[arg-type]
    assert not dashboard.state_dir.exists()


def test_folder_that_can_t_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "dashboard").touch()
    with pytest.raises(ResourceError, match=r"\(dashboard\.state_dir\): File exists"):
        webservice.run("dashboard", section(tmp_path), lambda: Greeting(None))  # type: ignore[arg-type]


def test_error_in_the_background_ends_the_service(tmp_path: Path) -> None:
    service = Running(section(tmp_path), Failing)
    service.event()  # its URL
    error = service.event()
    assert isinstance(error, ValueError)
    assert str(error) == "a mistake in the background"


@pytest.mark.parametrize(
    ("host", "hosts", "url"),
    [
        ("127.0.0.1", ("127.0.0.1",), "http://127.0.0.1:80"),
        ("localhost", ("localhost",), "http://localhost:80"),
        ("0.0.0.0", ("0.0.0.0",), "http://127.0.0.1:80"),
        ("::", ("::",), "http://[::1]:80"),
        ("10.0.0.7", ("10.0.0.7", "127.0.0.1"), "http://10.0.0.7:80"),
        ("fd00::7", ("fd00::7", "127.0.0.1"), "http://[fd00::7]:80"),
    ],
)
def test_where_it_listens_and_how_it_is_reached(
    host: str, hosts: tuple[str, ...], url: str
) -> None:
    assert webservice._hosts(host) == hosts
    assert webservice._url(host, 80) == url

"""Messages to systemd, over a real datagram socket."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.runtime import systemd


@pytest.fixture(autouse=True)
def _not_connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(systemd, "_socket", None)
    yield
    if systemd._socket is not None:
        systemd._socket.close()


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """The other end, with the worker connected to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(10)
        if request.param == "file":
            listening.bind(str(tmp_path / "notify"))
            systemd.connect(str(tmp_path / "notify"))
        else:
            name = f"hivewright-test-{tmp_path.name}"
            listening.bind(f"\0{name}")
            systemd.connect(f"@{name}")
        yield listening


def test_each_call_is_one_message(manager: socket.socket) -> None:
    systemd.ready()
    systemd.progress("training, round 7, connected")
    systemd.stopping("closing")
    assert [manager.recv(4096).decode() for _ in range(3)] == [
        "READY=1",
        "WATCHDOG=1\nSTATUS=training, round 7, connected",
        "STOPPING=1\nSTATUS=closing",
    ]


def test_text_in_any_language_arrives(manager: socket.socket) -> None:
    systemd.progress("\u00fcben")
    assert manager.recv(4096) == "WATCHDOG=1\nSTATUS=\u00fcben".encode()


def test_without_systemd_nothing_happens() -> None:
    systemd.connect(None)
    systemd.ready()
    systemd.progress("training")
    systemd.stopping("closing")


def test_socket_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        systemd.connect(str(tmp_path / "none"))

"""A silent host loses its connection, one that answers keeps it; connections are stand-ins."""

import time

import gevent
import pytest
from paramiko import SSHException

from deploys.pyinfra_ext import keepalive


class Connection:
    """A paramiko Transport whose other end answers `num_answers` times, then is silent or gone."""

    def __init__(self, num_answers: int, then: str) -> None:
        self.left, self._then, self.is_closed = num_answers, then, False

    def is_active(self) -> bool:
        return not self.is_closed

    def global_request(self, kind: str, wait: bool) -> None:
        assert wait
        if self.left:
            self.left -= 1
        elif self._then == "silent":
            gevent.sleep(60)
        else:
            raise SSHException("gone")

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "ASK_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(keepalive, "SILENCE_SECONDS", 0.05)


def test_silent_host_is_let_go() -> None:
    silent, began = Connection(3, "silent"), time.monotonic()
    keepalive._watch(silent)
    assert silent.is_closed
    assert silent.left == 0
    assert time.monotonic() - began < 10


def test_connection_that_has_ended_is_watched_no_more() -> None:
    gone = Connection(2, "gone")
    keepalive._watch(gone)
    assert (gone.left, gone.is_closed) == (0, False)

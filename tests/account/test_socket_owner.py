"""The user at the other end of a connection, also while rows of former ones are in the tables."""

import os
import socket
import sys
from pathlib import Path

import pytest

from worker.account import socket_owner
from worker.account.socket_owner import owner_of

OWN = ("127.0.0.1", 3000)
PEER = ("127.0.0.2", 40_000)
ESTABLISHED, TIME_WAIT, CLOSE_WAIT = "01", "06", "08"
HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout"


def place(host: str, port: int) -> str:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(kind, host)
    words = [packed[at : at + 4] for at in range(0, len(packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"


def row(local: tuple[str, int], remote: tuple[str, int], state: str, user: int) -> str:
    places = f"{place(*local)} {place(*remote)}"
    return f"   0: {places} {state} 00000000:00000000 00:00000000 00000000 {user:5} 0 1234"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    files = (tmp_path / "tcp", tmp_path / "tcp6")
    for file in files:
        file.write_text(HEAD + "\n")
    monkeypatch.setattr(socket_owner, "_TABLES", files)
    return files


@pytest.mark.parametrize(
    "former",
    [
        row(("127.0.0.1", PEER[1]), OWN, TIME_WAIT, 0),
        row(("127.0.0.1", PEER[1]), OWN, ESTABLISHED, 0),
        row(PEER, ("127.0.0.3", OWN[1]), ESTABLISHED, 0),
        row(PEER, OWN, TIME_WAIT, 0),
        row(OWN, PEER, ESTABLISHED, 0),
    ],
)
def test_row_of_another_connection_with_the_same_ports_is_not_believed(tables, former) -> None:
    tables[0].write_text(f"{HEAD}\n{former}\n")
    assert owner_of(PEER, OWN) is None
    tables[0].write_text(f"{HEAD}\n{former}\n{row(PEER, OWN, ESTABLISHED, 998)}\n")
    assert owner_of(PEER, OWN) == 998


def test_connection_that_its_maker_has_closed_has_no_owner(tables) -> None:
    tables[0].write_text(f"{HEAD}\n{row(PEER, OWN, CLOSE_WAIT, 0)}\n")
    assert owner_of(PEER, OWN) is None


@pytest.mark.parametrize("mapped", ["::ffff:127.0.0.1", "::ffff:127.0.0.2"])
def test_sockets_for_both_kinds_of_addresses_are_compared_as_plain_ones(tables, mapped) -> None:
    both = [(f"::ffff:{host}", port) for host, port in (PEER, OWN)]
    tables[1].write_text(f"{HEAD}\n{row(*both, ESTABLISHED, 5)}\n")
    assert owner_of(PEER, OWN) == 5
    assert owner_of(both[0], both[1]) == 5
    assert owner_of((mapped, 1), OWN) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_owner_of_a_real_connection_is_its_maker(host) -> None:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=kind) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
    ):
        accepted, peer = server.accept()
        with accepted:
            assert peer == client.getsockname()
            own = accepted.getsockname()
            assert owner_of(peer[:2], own[:2]) == os.getuid()
            assert owner_of((peer[0], 1), own[:2]) is None

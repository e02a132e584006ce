"""The libp2p daemon keeps identity and address, obeys its timeout, never outlives its worker."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hivemind.proto import p2pd_pb2
from swarm_lab import Lab, make_groups, wait_until

from worker import settings
from worker.errors import ResourceError
from worker.swarm import identity
from worker.swarm.swarm import Swarm
from worker.swarm.transport import daemon


def children(pid: int) -> list[int]:
    """Our p2pd processes (and the moment before they are p2pd), by parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            if parent == pid and b"p2pd" in command:
                found.append(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pid_of(swarm: Swarm) -> int:
    current = swarm._network.connections.daemon
    return current.pid if current is not None else 0


@pytest.mark.parametrize(
    "kills", [5, pytest.param(100, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])]
)
def test_killed_daemon_comes_back_as_the_same_peer_at_the_same_address(
    lab: Lab, kills: int
) -> None:
    lab.bootnode()
    victim, other = lab.peer("a"), lab.peer("b")
    wait_until(
        lambda: victim.status().peers_known == other.status().peers_known == 1,
        15,
        "both know each other",
    )
    before = victim.status()
    for round in range(1, kills + 1):
        killed = pid_of(victim)
        os.kill(killed, signal.SIGKILL)
        for swarm in (victim, other):
            swarm.publish(round, make_groups(swarm.status().peer_id, round))
        wait_until(
            lambda killed=killed: pid_of(victim) not in (0, killed), 15, "the daemon is back"
        )  # type: ignore[misc]
        after = victim.status()
        assert (after.peer_id, after.addresses) == (before.peer_id, before.addresses)
        assert len(victim.collect(round, 9).groups) == 9
        assert len(other.collect(round, 9).groups) == 9
    assert victim.status().daemon_restarts == kills
    assert "libp2p daemon" in str(
        victim.status().last_error
    )  # ended with -9, or not there: whoever sees it first


def test_collect_goes_on_while_the_daemon_is_killed(lab: Lab) -> None:
    lab.bootnode()
    victim, other = lab.peer("a"), lab.peer("b")
    wait_until(lambda: victim.status().peers_known == 1, 15, "a knows b")
    other.publish(1, make_groups(other.status().peer_id, 1))
    os.kill(pid_of(victim), signal.SIGKILL)
    started = time.monotonic()
    victim.collect(1, 9)  # what it brings depends on the moment
    assert time.monotonic() - started < 20
    wait_until(lambda: len(victim.collect(1, 9).groups) == 9, 20, "a gets b's groups again")


def test_peer_that_is_cut_off_without_a_word_is_noticed_and_found_again(lab: Lab) -> None:
    bootnode = lab.bootnode()
    stays, hangs = lab.peer("a"), lab.peer("b")
    wait_until(
        lambda: stays.status().peers_known == hangs.status().peers_known == 1,
        15,
        "both know each other",
    )
    frozen = [pid_of(hangs), bootnode.connections.daemon.pid]  # type: ignore[union-attr]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert stays.collect(1, 9).heard == ()
        assert time.monotonic() - started < 20
        assert stays.status().state == "training-alone"
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: stays.status().state == "catching-up", 20, "they are in contact again")
    hangs.publish(2, make_groups(hangs.status().peer_id, 2))
    assert len(stays.collect(2, 9).groups) == 9


def test_connection_is_kept_and_a_peer_that_moved_is_reached_at_its_new_address(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.bootnode()
    asks, moves = lab.peer("a"), lab.peer("b")
    wait_until(lambda: asks.status().peers_known == 1, 15, "a knows b")
    moves.publish(1, make_groups(moves.status().peer_id, 1))
    assert len(asks.collect(1, 9).groups) == 9

    dialled = []
    connect = daemon.Daemon.connect

    async def note(self: daemon.Daemon, peer_id: str, *rest: object) -> None:
        dialled.append(peer_id)
        await connect(self, peer_id, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(daemon.Daemon, "connect", note)
    assert len(asks.collect(1, 9).groups) == 9
    assert moves.status().peer_id not in dialled

    before = moves.status().addresses
    moves.close()
    (lab.folder("b") / "peers.json").unlink()
    back = lab.peer("b", port=free_port())
    wait_until(lambda: back.status().peers_known == 1, 15, "b is back and has greeted a")
    assert back.status().addresses != before
    back.publish(2, make_groups(back.status().peer_id, 2))
    wait_until(
        lambda: len(asks.collect(2, 9).groups) == 9, 20, "a gets the groups from the new address"
    )


def test_connection_over_what_only_the_daemon_understands_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that hivemind can't parse, webtransport's, must not break the list."""
    arguments = daemon._arguments

    def over_webtransport(*options: object) -> list[str]:
        _, *rest = arguments(*options)  # type: ignore[arg-type]
        return [f"-hostAddrs=/ip4/127.0.0.1/udp/{free_port()}/quic-v1/webtransport", *rest]

    async def meet() -> None:
        mine, theirs = identity.create(tmp_path / "mine"), identity.create(tmp_path / "theirs")
        swarm = settings.Swarm(host="127.0.0.1")
        us = await daemon.Daemon.start(tmp_path / "mine", swarm, 0)
        monkeypatch.setattr(daemon, "_arguments", over_webtransport)
        them = await daemon.Daemon.start(tmp_path / "theirs", swarm, 0)
        try:
            assert them.addresses == await them.find_addresses() == ()
            await them.connect(mine.peer_id, us.addresses, 5)
            async with asyncio.timeout(10):
                while theirs.peer_id not in await us.connections():
                    await asyncio.sleep(0.05)
            us_at_them = await them.connections()
            assert us_at_them == {mine.peer_id: True}
        finally:
            await us.stop()
            await them.stop()

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(meet())


def connected_at(places: list[list[bytes]]) -> daemon.Daemon:
    """A daemon that is connected to a peer a0, a1, ... at each list of encoded addresses."""

    async def list_peers(request: object) -> p2pd_pb2.Response:
        peers = [
            p2pd_pb2.PeerInfo(id=b"\x12\x02a%d" % number, addrs=addresses)
            for number, addresses in enumerate(places)
        ]
        return p2pd_pb2.Response(type=p2pd_pb2.Response.OK, peers=peers)

    silent = daemon.Daemon.__new__(daemon.Daemon)
    silent._call = list_peers  # type: ignore[method-assign,assignment]
    return silent


def test_connection_without_an_address_is_one() -> None:
    silent = connected_at([[], [b"\xd1\x03"], [b"\xff"]])
    assert list(asyncio.run(silent.connections()).values()) == [False] * 3


def test_connections_are_listed_without_a_search_for_bridges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads sysfs, and the list is read twice a minute, with as many connections as peers."""

    def search() -> frozenset[str]:
        raise AssertionError("searched for bridges")

    monkeypatch.setattr(daemon, "inner_hosts", search)
    direct = daemon._encode("/ip4/10.0.0.5/tcp/1")
    [is_direct] = asyncio.run(connected_at([[direct]]).connections()).values()
    assert is_direct


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_close_ends_the_daemon_and_its_folder(lab: Lab) -> None:
    swarm = lab.peer("a")
    wait_until(lambda: pid_of(swarm) != 0, 30, "the daemon runs")
    pid, folder = pid_of(swarm), swarm._network.connections.daemon._folder  # type: ignore[union-attr]
    swarm.close()
    assert not is_running(pid)
    assert not folder.exists()


WORKER = """
import sys, time
from pathlib import Path
from worker import settings
from worker.swarm.context import SwarmContext
from worker.swarm.network import Network
folder = Path(sys.argv[1])
network = Network(SwarmContext(settings.Swarm(host="127.0.0.1"), folder / "swarm.pem", folder))
network.start()
while not network.context.is_up:
    time.sleep(0.05)
print("up", flush=True)
time.sleep(60)
"""


def test_leftover_that_another_worker_removes_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / f"{daemon._FOLDER_PREFIX}1-gone"
    left = tmp_path / f"{daemon._FOLDER_PREFIX}{2**22 + 1}-left"  # above any process id
    left.mkdir()
    monkeypatch.setattr(daemon.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone, left]))
    daemon._remove_leftovers()
    assert not left.exists()


def test_daemon_dies_with_a_killed_worker(lab: Lab) -> None:
    folder = lab.folder("a")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "up\n"
        [pid] = children(worker.pid)
        control = (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .decode()
            .partition("-listen=/unix")[2]
            .partition("\0")[0]
        )
        worker.kill()
        worker.wait(10)
        wait_until(lambda: not is_running(pid), 5, "p2pd is gone")
        assert Path(control).parent.exists()  # nobody was left to remove it
        swarm = lab.peer("b")
        wait_until(lambda: pid_of(swarm) != 0, 30, "the next daemon runs")
        assert not Path(control).parent.exists()
    finally:
        worker.kill()
        worker.wait(10)
        if worker.stdout is not None:
            worker.stdout.close()


def test_start_does_not_wait_and_the_time_out_is_obeyed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "p2pd"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(daemon, "P2PD", slow)
        swarm = lab.peer("a", startup_timeout_seconds=4.0)
        assert swarm.status().state == "starting"
        assert swarm.collect(1, 4).heard == ()
        wait_until(lambda: swarm.status().last_error is not None, 12, "the time-out is reported")
        assert (
            swarm.status().last_error
            == "libp2p daemon: not ready after 4 s (swarm.startup_timeout_seconds); trying again"
        )
        assert swarm.status().state == "training-alone"
    wait_until(lambda: swarm.status().addresses != (), 60, "it comes up in the end")


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.nightly)])
def test_daemon_that_starts_late_keeps_nobody_waiting_and_is_used_in_the_end(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    lab.bootnode()
    late = tmp_path / "p2pd"
    late.write_text(f'#!/bin/sh\nsleep {seconds}\nexec {daemon.P2PD} "$@"\n')
    late.chmod(0o755)
    monkeypatch.setattr(daemon, "P2PD", late)
    started = time.monotonic()
    swarm = lab.peer("a")
    assert swarm.collect(1, 9).heard == ()  # a round trained alone
    assert swarm.status().addresses == ()  # and nobody has waited for the daemon
    wait_until(lambda: swarm.status().addresses != (), seconds + 10, "it is up")
    assert time.monotonic() - started > seconds
    assert swarm.status().daemon_restarts == 0


def test_daemon_that_fails_at_once_is_reported_with_its_own_words(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "p2pd"
    broken.write_text("#!/bin/sh\necho no room for a socket\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(daemon, "P2PD", broken)
    swarm = lab.peer("a")
    wait_until(lambda: swarm.status().last_error is not None, 10, "the failure is reported")
    assert swarm.status().last_error == "libp2p daemon ended with 3: no room for a socket"


def test_fixed_port_that_is_in_use_is_an_error(lab: Lab) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError) as caught:
            lab.peer("a", port=port)
    assert (
        str(caught.value)
        == f"port {port} (swarm.port): already in use on 127.0.0.1; free it or set another, 0 lets"
        " the kernel choose"
    )


def test_address_of_no_interface_is_an_error(lab: Lab) -> None:
    with pytest.raises(
        ResourceError, match=r"192.0.2.1 \(swarm.host\): no address of this machine"
    ):
        lab.peer("a", host="192.0.2.1", port=4001)


def test_remembered_port_that_is_taken_is_given_up(lab: Lab) -> None:
    swarm = lab.peer("a")
    wait_until(lambda: (lab.folder("a") / "peers.json").exists(), 15, "the port is remembered")
    port = swarm._context.port
    swarm.close()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        again = lab.peer("a")
        wait_until(lambda: again._context.is_up, 15, "it is up at another port")
        assert again._context.port not in (0, port)

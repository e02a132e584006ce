"""The bootnode keeps key and address, ends cleanly, and gives a reason if it can't start."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from worker import settings
from worker.errors import ResourceError, SwarmError
from worker.settings import Settings
from worker.swarm import bootnode
from worker.swarm.transport import daemon


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    return settings.from_flat(
        {"bootnode_host": "127.0.0.1", "bootnode_port": 0, "bootnode_state_dir": str(tmp_path)}, ""
    )


def run_until(
    config: Settings, condition: Callable[[], bool], number: int = signal.SIGTERM
) -> None:
    """Run the bootnode in this thread; once `condition` holds, this process gets the signal."""

    def watch() -> None:
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bootnode.run(config)
    watcher.join()


def free_port_of_its_own() -> int:
    """Return a port that the kernel does not hand out to connections of other tests."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def test_key_and_address_stay_and_stop_is_clean(tmp_path: Path) -> None:
    port = free_port_of_its_own()
    config = settings.from_flat(
        {"bootnode_host": "127.0.0.1", "bootnode_port": port, "bootnode_state_dir": str(tmp_path)},
        "",
    )
    address_file, seen = tmp_path / "multiaddr", []
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        address_file.unlink(missing_ok=True)
        run_until(config, address_file.exists, number)
        seen.append(address_file.read_text())
    assert seen[0] == seen[1]
    [line] = seen[0].splitlines()
    assert line.startswith(f"/ip4/127.0.0.1/tcp/{port}/")
    assert "/p2p/Qm" in line
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert not [t for t in threading.enumerate() if t.name == "swarm"]


def test_stop_during_the_start_is_clean(config: Settings, tmp_path: Path) -> None:
    run_until(config, (tmp_path / "bootnode.pem").exists)
    assert not (tmp_path / "multiaddr").exists()


def test_daemon_that_never_starts_is_an_error(
    config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "p2pd"
    broken.write_text("#!/bin/sh\necho no room\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(daemon, "P2PD", broken)
    swarm = config.swarm.model_copy(update={"startup_timeout_seconds": 1.0})
    with pytest.raises(SwarmError) as caught:
        bootnode.run(config.model_copy(update={"swarm": swarm}))
    assert str(caught.value) == (
        "bootnode: not ready within 1 s (swarm.startup_timeout_seconds):"
        " libp2p daemon ended with 1: no room"
    )


def test_port_in_use_is_an_error(config: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        section = config.bootnode.model_copy(update={"port": port})
        with pytest.raises(ResourceError) as caught:
            bootnode.run(config.model_copy(update={"bootnode": section}))
    assert (
        str(caught.value)
        == f"port {port} (bootnode.port): already in use on 127.0.0.1; free it or set another, 0"
        " lets the kernel choose"
    )

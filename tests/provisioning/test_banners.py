"""Tailscale's check mode: an ssh server that accepts `none` once a person has opened a URL."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from fake_hosts import PYINFRA

from tests import preloaded

CHECKOUT = Path(__file__).parents[2]
URL = "https://login.tailscale.com/a/0123abcd"


class CheckMode(paramiko.ServerInterface):
    """Accepts a login when `opened` is set, and runs commands."""

    def __init__(self, lets_in: bool) -> None:
        self.opened = threading.Event()
        self._lets_in = lets_in

    def get_banner(self) -> tuple[str, str]:
        return (
            f"# Tailscale SSH requires an additional check.\r\n# To authenticate, visit: {URL}\r\n",
            "en-US",
        )

    def get_allowed_auths(self, username: str) -> str:
        return "none"

    def check_auth_none(self, username: str) -> int:
        if self._lets_in and self.opened.wait(20):
            return paramiko.common.AUTH_SUCCESSFUL
        return paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        def run() -> None:
            done = subprocess.run(
                ["sh", "-c", command], capture_output=True, timeout=20, check=False
            )
            channel.sendall(done.stdout)
            channel.send_exit_status(done.returncode)
            channel.close()

        threading.Thread(target=run, daemon=True).start()
        return True


@contextlib.contextmanager
def serving(server: CheckMode) -> Iterator[int]:
    """Run the server on loopback; yield its port."""
    key = paramiko.ECDSAKey.generate()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    transport = paramiko.Transport(listener.accept()[0])
                    transport.add_server_key(key)
                    transport.start_server(server=server)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def pyinfra(folder: Path, port: int, server: CheckMode, *, with_key: bool) -> tuple[int, str]:
    """Run a command there; a person opens the URL when it is printed. Return code and stderr."""
    access = {
        "ssh_hostname": "127.0.0.1",
        "ssh_port": port,
        "ssh_user": "root",
        "ssh_strict_host_key_checking": "no",
        "ssh_known_hosts_file": str(folder / "known_hosts"),
        "ssh_allow_agent": False,
        "ssh_look_for_keys": False,
    }
    if with_key:
        paramiko.ECDSAKey.generate().write_private_key_file(str(folder / "key"))
        access["ssh_key"] = str(folder / "key")
    (folder / "known_hosts").touch()
    (folder / "fleet.py").write_text(f"workers = [('gpu-1', {access!r})]\n")
    command = [
        sys.executable,
        "-m",
        "pyinfra",
        "-y",
        folder / "fleet.py",
        "exec",
        "--",
        "echo",
        "got in",
    ]
    with (folder / "said").open("w") as said:
        process = preloaded.Popen(
            command, PYINFRA, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if f"visit: {URL}" in (folder / "said").read_text():
                server.opened.set()
            time.sleep(0.1)
        code = process.wait(timeout=20)
    return code, (folder / "said").read_text()


@pytest.mark.parametrize("with_key", [True, False])
def test_url_of_a_banner_is_shown_while_the_server_waits_and_the_host_is_then_reached(
    tmp_path: Path, with_key: bool
) -> None:
    server = CheckMode(lets_in=True)
    with serving(server) as port:
        code, said = pyinfra(tmp_path, port, server, with_key=with_key)
    assert code == 0, said
    assert f"gpu-1 says: # To authenticate, visit: {URL}" in said
    assert said.count(URL) == 1
    assert "got in" in said


def test_banner_of_a_server_that_lets_nobody_in_is_shown(tmp_path: Path) -> None:
    server = CheckMode(lets_in=False)
    with serving(server) as port:
        code, said = pyinfra(tmp_path, port, server, with_key=True)
    assert code != 0
    assert f"gpu-1 says: # To authenticate, visit: {URL}" in said
    assert "Authentication error" in said

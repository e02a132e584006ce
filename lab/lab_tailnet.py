"""A tailnet for a lab: real tailscaled on its hosts and at its operator, and a control server.

The programs come from a folder that HIVEWRIGHT_TAILSCALE names: `tailscaled.xz` (daemon and command
line in one program), `control.xz` (the test server of Tailscale's own module, with switches) and
`tailscaled.service`.
"""

import json
import lzma
import os
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

from lab.lab import Lab
from lab.lab_host import Host
from lab.lab_network import OPERATOR_ADDRESS
from lab.process import start, wait_until

FOLDER = "HIVEWRIGHT_TAILSCALE"
FILES = ("tailscaled.xz", "control.xz", "tailscaled.service")
SERVER = f"http://{OPERATOR_ADDRESS}:8080"
KEY = "tskey-auth-good-1"


def why_no_tailnet() -> str | None:
    """Return why a real tailnet is impossible here, in one line; None if it is possible."""
    named = os.environ.get(FOLDER)
    if not named:
        return (
            f"real tailscaled and its control server are found by {FOLDER}=FOLDER, which is not set"
        )
    missing = [name for name in FILES if not (Path(named) / name).is_file()]
    return f"{FOLDER}={named}: no {', '.join(missing)} in it" if missing else None


class LabTailnet:
    """The control server of a lab, and the daemon of its operator."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._folder = lab.folder / "tailscale"
        self._source = Path(os.environ[FOLDER])

    def start(self) -> None:
        """Start the control server and the operator's daemon."""
        self._folder.mkdir()
        for packed in ("tailscaled", "control"):
            self._unpack(packed, self._folder / packed)
        (self._folder / "tailscale").symlink_to("tailscaled")
        self.start_control()
        socket, state = self._folder / "socket", self._folder / "state"
        daemon = self.lab.network.inside(
            self._folder / "tailscaled",
            "--no-logs-no-support",
            f"--statedir={state}",
            f"--socket={socket}",
            "--tun=tsop0",
            "--port=0",
        )
        start(daemon, self.lab.folder / "tailscaled.pid", self.lab.folder / "tailscaled.log")
        wait_until(socket.exists, 15, "the operator's tailscaled listens")
        login = (f"--login-server={SERVER}", f"--auth-key={KEY}", "--accept-dns=false")
        self.operator("up", *login, "--hostname=operator", "--timeout=30s")

    def start_control(self) -> None:
        control = self.lab.network.inside(self._folder / "control", f"-addr={OPERATOR_ADDRESS}")
        start(control, self.lab.folder / "control.pid", self.lab.folder / "control.log")
        wait_until(lambda: self._asked("/lab/nodes") is not None, 15, "the control server answers")

    def operator(self, *arguments: str) -> str:
        """Run `tailscale` as the operator."""
        program = (self._folder / "tailscale", f"--socket={self._folder / 'socket'}")
        return self.lab.operator(*program, *arguments, timeout=60).stdout

    def install(self, host: Host) -> None:
        """Install the daemon and its unit on a host, running and logged out."""
        self._unpack("tailscaled", host.root / "usr/sbin/tailscaled")
        shutil.copy(host.root / "usr/sbin/tailscaled", host.root / "usr/bin/tailscale")
        shutil.copy(self._source / "tailscaled.service", host.root / "lib/systemd/system")
        host.ssh("systemctl daemon-reload && systemctl enable --now --quiet tailscaled")

    def login(self, host: Host, *flags: str) -> str:
        """Log a host in as its administrator would, and return its address in the tailnet."""
        host.ssh(
            f"tailscale up --login-server={SERVER} --auth-key={KEY} --timeout=30s {' '.join(flags)}"
        )
        address = host.ssh("tailscale ip -4").stdout.strip()
        self.trust(host, address)
        wait_until(lambda: "pong" in self._pinged(address), 30, f"{host.name} answers at {address}")
        return address

    def trust(self, host: Host, address: str) -> None:
        """Add the host's key for its tailnet address to the operator's known hosts."""
        key = (host.folder / "host_key.pub").read_text().split()[:2]
        with (self.lab.folder / "known_hosts").open("a") as known:
            known.write(f"{address} {' '.join(key)}\n")

    def set(self, path: str, **values: str | int) -> Any:
        """Configure the control server, such as `set("set", ssh=0)`."""
        query = urllib.parse.urlencode(values)
        answer = self._asked(f"/lab/{path}?{query}")
        assert answer is not None, f"the control server does not answer to {path}"
        return answer

    @staticmethod
    def preferences(host: Host) -> Any:
        return json.loads(host.ssh("tailscale debug prefs").stdout)

    def _pinged(self, address: str) -> str:
        socket = f"--socket={self._folder / 'socket'}"
        ping = (self._folder / "tailscale", socket, "ping", "--c=1", "--timeout=2s", address)
        return self.lab.operator(*ping, timeout=10, check=False).stdout

    def _asked(self, path: str) -> str | None:
        curl = ("curl", "--silent", "--fail", "--max-time", "5", SERVER + path)
        done = self.lab.operator(*curl, timeout=10, check=False)
        return done.stdout if done.returncode == 0 else None

    def _unpack(self, name: str, target: Path) -> None:
        with lzma.open(self._source / f"{name}.xz") as packed, target.open("wb") as program:
            shutil.copyfileobj(packed, program)
        target.chmod(0o755)

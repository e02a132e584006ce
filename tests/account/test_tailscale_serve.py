"""Signing in behind the real `tailscale serve`: two tailscaled and a control server on loopback.

The programs are in the folder that HIVEWRIGHT_TAILSCALE names; without it the test is skipped. They
need no network device: both daemons have a network stack of their own. The page is served by plain
HTTP inside of the tailnet, because a certificate would come from the internet.
"""

import json
import lzma
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from account_service import eventually, serving
from playwright.sync_api import expect

from lab.lab_tailnet import FOLDER, KEY, why_no_tailnet
from tests.account.hosting import HOST, hosted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONTROL = "127.0.0.1"


@contextmanager
def program(*command: object) -> Iterator[None]:
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()


class Tailnet:
    """A control server, and daemons by name, in `folder`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        for name in ("tailscaled", "control"):
            target = folder / name
            with lzma.open(Path(os.environ[FOLDER]) / f"{name}.xz") as packed:
                target.write_bytes(packed.read())
            target.chmod(0o755)
        shutil.copy(folder / "tailscaled", folder / "tailscale")
        stack.enter_context(program(folder / "control", f"-addr={CONTROL}"))
        eventually(lambda: answers(8080))

    def join(self, name: str) -> int:
        """Start a daemon and log it in; return the port of its SOCKS proxy into the tailnet."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        daemon = (
            "--no-logs-no-support",
            f"--statedir={self._folder / name}.state",
            f"--socket={self._folder / name}",
            "--tun=userspace-networking",
            f"--socks5-server=127.0.0.1:{port}",
            "--port=0",
        )
        self._stack.enter_context(program(self._folder / "tailscaled", *daemon))
        eventually((self._folder / name).exists)
        login = (f"--login-server=http://{CONTROL}:8080", f"--auth-key={KEY}", "--timeout=60s")
        self.run(name, "up", *login, f"--hostname={name}", "--accept-dns=false")
        return port

    def run(self, name: str, *arguments: str) -> str:
        done = subprocess.run(
            [self._folder / "tailscale", f"--socket={self._folder / name}", *arguments],
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((CONTROL, port)) == 0


@pytest.fixture
def tailnet(tmp_path) -> Iterator[Tailnet]:
    if reason := why_no_tailnet():
        pytest.skip(reason)
    if os.geteuid() != 0 or answers(8080):
        pytest.skip(
            "needs root, whose connections are believed, and port 8080 for the control server"
        )
    with ExitStack() as stack:
        yield Tailnet(tmp_path, stack)


def test_person_that_tailscale_serve_names_is_let_in_and_a_forged_name_is_not(
    chain, tmp_path, tailnet, chromium
) -> None:
    changes = {"behind_proxy": True, "tailscale_login": True}
    parsed = hosted(chain.settings, tmp_path / "account", **changes)
    with serving(parsed) as service:
        tailnet.join("hub")
        tailnet.run("hub", "serve", "--bg", "--http=80", service.url)
        address = tailnet.run("hub", "ip", "-4").strip()
        name = json.loads(tailnet.run("hub", "status", "--json"))["Self"]["DNSName"].rstrip(".")
        proxy = tailnet.join("phone")
        jar = tmp_path / "cookies"

        def curl(*flags: str, path: str = "/sign-in") -> str:
            through = ("--socks5", f"127.0.0.1:{proxy}", "--resolve", f"{name}:80:{address}")
            cookies = ("--cookie", str(jar), "--cookie-jar", str(jar))
            return subprocess.run(
                ["curl", "--silent", *through, *cookies, *flags, f"http://{name}{path}"],
                capture_output=True,
                text=True,
                timeout=60,
            ).stdout

        eventually(lambda: "Sign in" in curl(), 90)
        named = re.search(r"Continue as (\S+@[\w.-]+)", curl())
        assert named is not None, curl()
        forged = ("--header", f"Tailscale-User-Login: {HOST}")
        assert f"Continue as {named[1]}" in curl(*forged)
        form = ("--header", f"Origin: http://{name}", "--data", "next=")
        assert "303" in curl(*forged, *form, "--include", path="/sign-in/tailscale").split("\n")[0]
        page = curl(path="/")
        assert "My nodes" in page
        assert named[1] in page
        assert [each.email for each in service.service.accounts.all()] == [None, named[1]]
        context = chromium.new_context(proxy={"server": f"socks5://127.0.0.1:{proxy}"})
        with closing(context):
            tab = context.new_page()
            tab.goto(f"http://{name}/sign-in")
            tab.get_by_role("button", name=f"Continue as {named[1]}").click()
            expect(tab.get_by_role("heading", name="My nodes")).to_be_visible()

"""Tailscale: its signed apt repository, the host's login, and what the host shows in the tailnet.

A host that is logged in is left alone. One that is not logs in with an auth key, or with a person: all hosts ask for
their login URLs first, the URLs of all are shown together, once, and the run goes on with those that get connected.
"""

import base64
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pyinfra import host
from pyinfra.api import FunctionCommand, StringCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.context import ctx_host

from deploys import memory, report, tailnet, tailssh
from deploys.deployment import Deployment
from deploys.facts import ROOT, OwnFact
from deploys.hardware import Distribution
from deploys.system import APT, INSTALL_SECONDS
from deploys.tailnet import Tailnet

# Fingerprint 2596 A99E AAB3 3821 893C 0A79 458C A832 957F 5868; a test looks.
KEY = Path(__file__).parent / "keys/tailscale.asc"
KEYRING = Path("/etc/apt/keyrings/tailscale.asc")
SOURCES = Path("/etc/apt/sources.list.d/tailscale.sources")
# The ports that a deploy has had shown, a line for each: only these it ever stops showing.
SERVED = ROOT / "tailscale-serve"
REPOSITORY = "https://pkgs.tailscale.com/stable"
ASK_EVERY_SECONDS = 2.0
# With a key; and until a login URL is there.
LOGIN_SECONDS = 90
SERVE_SECONDS = 60


class TailnetOfHost(OwnFact[Tailnet]):
    """The host's place in its tailnet."""

    def command(self) -> str:
        ask = " ".join(
            f'"$(timeout 20 tailscale {command} 2>/dev/null || echo null)"'
            for command in ("status --json --peers=false", "debug prefs", "serve status --json")
        )
        form = '{"status": %s, "prefs": %s, "serve": %s, "ours": "%s"}'
        ours = f'"$(cat {SERVED} 2>/dev/null | tr "\\n" " ")"'
        return f"if command -v tailscale >/dev/null; then printf '{form}' {ask} {ours}; fi"

    @staticmethod
    def default() -> Tailnet:
        return Tailnet()

    def read(self, output: list[str]) -> Tailnet:
        return tailnet.parse("\n".join(output))


@deploy("Tailscale")
def join_tailnet(deployment: Deployment) -> None:
    """Have the host in the tailnet, if the inventory says so."""
    if not deployment.tailscale:
        return
    _members.add(host.name)
    install(name="Install it from its own repository", _timeout=INSTALL_SECONDS)
    begin_login(name="Begin the login", deployment=deployment, _timeout=LOGIN_SECONDS + 60)
    seconds = deployment.tailscale_login_seconds
    await_login(name="Wait until it is logged in", seconds=seconds, _timeout=seconds + 120)
    preferences(name="Set its preferences", deployment=deployment)
    switch_ssh(name="Switch its ssh server", wanted=deployment.tailscale_ssh, _timeout=tailssh.LONGEST_SECONDS)
    serve(name="Show ports in the tailnet", ports=deployment.tailscale_serve)
    found = host.get_fact(TailnetOfHost)
    if found.is_connected:
        for worry in found.worries(datetime.now(UTC), deployment.tailscale_login_server):
            report.note(f"{host.name}: {worry}")


@operation()
def install() -> Iterator[StringCommand]:
    """Have Tailscale. One that is there, wherever it is from, is left to whoever installed it."""
    if host.get_fact(TailnetOfHost).is_installed:
        host.noop("Tailscale is installed")
        return
    yield _write(KEYRING, KEY.read_text())
    system = host.get_fact(Distribution)
    yield _write(SOURCES, sources(system.name, system.codename))
    yield StringCommand(f"{APT} update")
    yield StringCommand(f"{APT} install --no-install-recommends tailscale")
    yield StringCommand("systemctl enable --now --quiet tailscaled")


def sources(distribution: str, codename: str) -> str:
    """The apt source for a Debian or Ubuntu. Packages that another key has signed are refused by apt."""
    return (
        f"Types: deb\nURIs: {REPOSITORY}/{distribution}\nSuites: {codename}\nComponents: main\nSigned-By: {KEYRING}\n"
    )


def _write(path: Path, text: str) -> StringCommand:
    script = f"umask 022 && mkdir -p {path.parent} && base64 -d > {path}.new && mv {path}.new {path}"
    return StringCommand(script, _stdin=[base64.b64encode(text.encode()).decode()])


@operation()
def begin_login(deployment: Deployment) -> Iterator[StringCommand]:
    """Have the host logged in with its key, or have it ask for a login URL."""
    found = host.get_fact(TailnetOfHost)
    if found.is_connected:
        host.noop("it is logged in")
        return
    key = tailnet.auth_key(deployment)
    flags = shlex.join(tailnet.login_flags(deployment, found))
    if key is not None:
        encoded = base64.b64encode(key.encode()).decode()
        yield StringCommand(key_login_script(flags), _stdin=[encoded])
    else:
        yield StringCommand(ask_login_script(flags, deployment.tailscale_login_seconds))


def key_login_script(flags: str) -> str:
    """Shell commands that log in with the key that comes, in base 64, on standard input. It is on no command line."""
    return (
        "umask 077; key=$(mktemp) && trap 'rm -f \"$key\"' EXIT && base64 -d > $key"
        f" && tailscale up --auth-key=file:$key --timeout={LOGIN_SECONDS}s {flags}"
    )


def ask_login_script(flags: str, seconds: int) -> str:
    """Shell commands that leave `tailscale up` waiting for a person, and end when there is a URL for that person."""
    return (
        f"setsid tailscale up --timeout={seconds}s {flags} </dev/null >/dev/null 2>&1 &"
        f" for second in $(seq {LOGIN_SECONDS}); do"
        " tailscale status --json --peers=false | grep -qE"
        ' \'"AuthURL": *"http|"BackendState": *"(Running|NeedsMachineAuth)"\' && exit 0; sleep 1; done;'
        f" echo 'no login URL within {LOGIN_SECONDS} s; is the control server reachable from here?' >&2; exit 1"
    )


@operation()
def await_login(seconds: int) -> Iterator[FunctionCommand]:
    """Have the host connected: show the login URLs of all hosts, once, and wait for the people who open them."""
    if host.get_fact(TailnetOfHost).is_connected:
        host.noop("it is logged in")
        return
    yield FunctionCommand(_wait_for_login, (seconds,), {})


# Hosts that are to be in a tailnet, and when their URLs were shown: from then on each has its own time.
_members: set[str] = set()
_shown: dict[str, float] = {}
_lock = threading.Lock()


def _wait_for_login(state: State, host: Host, seconds: int) -> bool:
    """Wait for this host; the first one that comes here shows the URLs of all. False: the time is over."""
    with _lock:
        if host.name not in _shown:
            asked = [each for each in state.inventory.get_active_hosts() if each.name in _members]
            found = dict(state.fact_pool.map(_look, asked))
            _show_urls({name: _where_to_go(of) for name, of in found.items() if not of.is_connected})
            _shown.update(dict.fromkeys(found, time.monotonic()))
    deadline = _shown[host.name] + seconds
    while not _look(host)[1].is_connected:
        if time.monotonic() > deadline:
            print(f"{host.name}: not logged in within {seconds} s (tailscale_login_seconds)", file=sys.stderr)
            return False
        time.sleep(ASK_EVERY_SECONDS)
    return True


def _look(of: Host) -> tuple[str, Tailnet]:
    with ctx_host.use(of):
        memory.forget(of)
        return of.name, of.get_fact(TailnetOfHost)


def _where_to_go(found: Tailnet) -> str:
    if found.state == tailnet.NEEDS_APPROVAL:
        return f"{tailnet.APPROVAL_URL} (waits for approval)"
    return found.login_url or "no URL yet; see `tailscale status` there"


def _show_urls(urls: dict[str, str]) -> None:
    if not urls:
        return
    width = max(map(len, urls))
    lines = [f"  {name:{width}}  {url}" for name, url in sorted(urls.items())]
    print("\n".join(["", "Open these to log the hosts in:", "", *lines, ""]), file=sys.stderr, flush=True)


@operation()
def preferences(deployment: Deployment) -> Iterator[str]:
    """Have what can be changed without a new login as the inventory says."""
    found = host.get_fact(TailnetOfHost)
    flags = tailnet.changed_flags(deployment, found) if found.is_connected else []
    if not flags:
        host.noop("they are as they should be")
        return
    yield f"tailscale set {shlex.join(flags)}"


@operation()
def switch_ssh(wanted: bool | None) -> Iterator[FunctionCommand | str]:
    """Have Tailscale's own ssh server on or off, if the inventory says which."""
    found = host.get_fact(TailnetOfHost)
    if wanted is None or not found.is_connected or found.runs_ssh == wanted:
        host.noop("it is as it should be")
    elif isinstance(host.connector, SSHConnector):
        yield FunctionCommand(tailssh.switch, (wanted,), {})
    else:
        # Without a connection of this run's that could end. If there is one of a person's, Tailscale itself refuses.
        yield f"tailscale set --ssh={str(wanted).lower()}"


@operation()
def serve(ports: dict[int, int]) -> Iterator[str]:
    """Have these ports of the host shown in the tailnet, and of those that a deploy had shown no others.

    What else the host shows is left alone.
    """
    found = host.get_fact(TailnetOfHost)
    wanted = {port: f"http://127.0.0.1:{local}" for port, local in ports.items()}
    for port, target in found.ours.items():
        if port not in wanted and found.serves.get(port) == target:
            yield f"timeout {SERVE_SECONDS} tailscale serve --https={port} off >&2"
    for port, target in wanted.items():
        if found.serves.get(port) != target:
            yield f"timeout {SERVE_SECONDS} tailscale serve --bg --https={port} {target} >&2"
    if found.ours != wanted:
        lines = " ".join(f"'{port} {target}'" for port, target in sorted(wanted.items()))
        yield f"printf '%s\\n' {lines} > {SERVED}" if wanted else f"rm -f {SERVED}"


STOP_SERVING = (
    f"[ ! -e {SERVED} ] || while read -r port target; do"
    f" timeout {SERVE_SECONDS} tailscale serve --https=$port off >&2; done < {SERVED}"
)

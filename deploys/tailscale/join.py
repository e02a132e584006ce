"""Tailscale: its signed apt repository, the host's login, and the ports it serves in the tailnet.

A host that is logged in is not changed. Other hosts log in with an auth key or with the help of a
person: first all hosts request their login URLs, then the URLs are printed together, once, and the
run continues with the hosts that get connected.
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

from deploys.facts import OwnFact
from deploys.hardware import Distribution
from deploys.inventory.schema import Deployment
from deploys.pyinfra_ext import fact_cache, run_report
from deploys.system import APT, APT_UPDATE, INSTALL_SECONDS
from deploys.tailscale import serve_ports, ssh_switch, tailnet
from deploys.tailscale.tailnet import Tailnet

# Fingerprint 2596 A99E AAB3 3821 893C 0A79 458C A832 957F 5868; a test looks.
KEY = Path(__file__).parent / "tailscale.asc"
KEYRING = Path("/etc/apt/keyrings/tailscale.asc")
SOURCES = Path("/etc/apt/sources.list.d/tailscale.sources")
REPOSITORY = "https://pkgs.tailscale.com/stable"
ASK_EVERY_SECONDS = 2.0
# Time limit until a key has logged the host in, or a login URL is there.
LOGIN_SECONDS = 90
# Time limit for `tailscale up` on a host after `tailscale down`.
UP_SECONDS = 30
# Time limit until a daemon that was just started knows its control server.
START_SECONDS = 15
ANSWER_SECONDS = 20


class TailnetOfHost(OwnFact[Tailnet]):
    """The host's state in its tailnet."""

    def command(self) -> str:
        ask = " ".join(
            f'"$(timeout 20 tailscale {command} 2>/dev/null || echo null)"'
            for command in ("status --json --peers=false", "debug prefs", "serve status --json")
        )
        form = '{"status": %s, "prefs": %s, "serve": %s, "ours": "%s"}'
        ours = f'"$(cat {serve_ports.SERVED} 2>/dev/null | tr "\n" " ")"'
        return f"if command -v tailscale >/dev/null; then printf '{form}' {ask} {ours}; fi"

    default = staticmethod(Tailnet)

    def read(self, output: list[str]) -> Tailnet:
        return tailnet.parse("\n".join(output))


@deploy("Tailscale")
def join_tailnet(deployment: Deployment) -> None:
    """Connect the host to the tailnet, if the inventory says so."""
    if not deployment.tailscale:
        return
    _members.add(host.name)
    install(name="Install it from its own repository", _timeout=INSTALL_SECONDS)
    run_daemon(name="Have its daemon run", _timeout=START_SECONDS + 60)
    begin_login(
        name="Begin the login", deployment=deployment, _timeout=LOGIN_SECONDS + UP_SECONDS + 60
    )
    seconds = deployment.tailscale_login_seconds
    await_login(name="Wait until it is logged in", seconds=seconds, _timeout=seconds + 120)
    switch_ssh(
        name="Switch its ssh server",
        wanted=deployment.tailscale_ssh,
        _timeout=ssh_switch.LONGEST_SECONDS,
    )
    preferences(name="Set its preferences", deployment=deployment)
    serve(name="Show ports in the tailnet", deployment=deployment)
    tell(name="Tell what a person should know", deployment=deployment)


@operation()
def install() -> Iterator[StringCommand]:
    """Install Tailscale unless it is installed, from whatever source."""
    if host.get_fact(TailnetOfHost).is_installed:
        host.noop("Tailscale is installed")
        return
    yield _write(KEYRING, KEY.read_text())
    system = host.get_fact(Distribution)
    yield _write(SOURCES, sources(system.name, system.codename))
    yield StringCommand(APT_UPDATE)
    yield StringCommand(f"{APT} install --no-install-recommends tailscale")


@operation()
def run_daemon() -> Iterator[StringCommand]:
    """Start and enable the daemon."""
    found = host.get_fact(TailnetOfHost)
    if found.is_installed and found.state is not None:
        host.noop("it answers")
        return
    yield StringCommand(start_script())


def start_script() -> str:
    """Return shell commands that start the daemon and wait until it knows its control server.

    If it does not start, they print its last log lines.
    """
    answer = "tailscale status --json --peers=false 2>/dev/null | grep '\"BackendState\"'"
    return (
        "systemctl enable --quiet tailscaled && systemctl start tailscaled"
        f" && for second in $(seq {START_SECONDS}); do"
        f' case "$({answer})" in ""|*NoState*) sleep 1;; *) exit 0;; esac; done'
        f' && [ -n "$({answer})" ] || {{'
        " echo 'tailscaled does not run; its last lines:' >&2;"
        " journalctl --unit=tailscaled --lines=10 --no-pager --output=cat >&2; exit 1; }"
    )


def sources(distribution: str, codename: str) -> str:
    """Return the apt source for a Debian or Ubuntu; apt refuses packages signed by another key."""
    return (
        f"Types: deb\nURIs: {REPOSITORY}/{distribution}\nSuites: {codename}\nComponents:"
        f" main\nSigned-By: {KEYRING}\n"
    )


def _write(path: Path, text: str) -> StringCommand:
    script = (
        f"umask 022 && mkdir -p {path.parent} && base64 -d > {path}.new && mv {path}.new {path}"
    )
    return StringCommand(script, _stdin=[base64.b64encode(text.encode()).decode()])


@operation()
def begin_login(deployment: Deployment) -> Iterator[StringCommand]:
    """Log the host in with its key, or make it ask for a login URL.

    A host that is stopped (`down`) needs neither.
    """
    found = host.get_fact(TailnetOfHost)
    if found.state == tailnet.STOPPED:
        yield StringCommand(f"timeout {UP_SECONDS} tailscale up >&2 || true")
        found = host.get_fact(TailnetOfHost)
    if found.state in (tailnet.RUNNING, tailnet.STOPPED, tailnet.NEEDS_APPROVAL, tailnet.NO_STATE):
        host.noop("it has its login")
        return
    key = tailnet.auth_key(deployment)
    script = login_script(
        shlex.join(tailnet.login_flags(deployment, found)),
        shlex.join(tailnet.kept_flags(found)),
        deployment.tailscale_login_seconds,
        has_key=key is not None,
    )
    encoded = [base64.b64encode(key.encode()).decode()] if key is not None else None
    yield StringCommand(script, _stdin=encoded) if encoded else StringCommand(script)


def login_script(
    flags: str,
    kept: str,
    seconds: int,
    *,
    has_key: bool,
) -> str:
    """Return shell commands that begin a login; they end when it is done or needs a person.

    The key comes in base64 on standard input and is on no command line. `tailscale up` continues in
    the background, while a person opens the URL or approves the machine. After a key is refused the
    daemon is stopped (`down`). `kept`: flags of `tailscale set` for preferences that `up` does not
    accept.
    """
    waits = (
        '"BackendState": *"NeedsMachineAuth"'
        if has_key
        else '"AuthURL": *"http|"BackendState": *"NeedsMachineAuth"'
    )
    key = " --auth-key=file:$work/key" if has_key else ""
    up = (
        f"tailscale up{key} --timeout={max(seconds, LOGIN_SECONDS)}s {flags} >$work/said 2>&1; echo"
        " $? >$work/code"
    )
    keep = f"tailscale set {kept} >&2" if kept else "true"
    what = "answer to the key" if has_key else "login URL"
    return (
        "umask 077; work=$(mktemp -d) || exit 1; export work; trap 'rm -rf $work' EXIT HUP INT"
        f" TERM; {'base64 -d >$work/key || exit 1;' if has_key else ''} setsid sh -c"
        f" {shlex.quote(up)} </dev/null >/dev/null 2>&1 & for second in $(seq {LOGIN_SECONDS}); do"
        ' if [ "$(cat $work/code 2>/dev/null)" = 0 ]; then exec_keep; exit; fi; if [ -s'
        " $work/code ]; then cat $work/said >&2; tailscale down; exit 1; fi; if tailscale status"
        f" --json --peers=false | grep -qE '{waits}'; then exec_keep; exit; fi; sleep 1; done; cat"
        f" $work/said >&2; tailscale down; echo 'no {what} within {LOGIN_SECONDS} s; is the control"
        " server reachable from here?' >&2; exit 1"
    ).replace("exec_keep", keep)


@operation()
def await_login(seconds: int) -> Iterator[FunctionCommand]:
    """Print the login URLs of all hosts, once, and wait until people have opened them."""
    if host.get_fact(TailnetOfHost).is_connected:
        host.noop("it is logged in")
        return
    yield FunctionCommand(_wait_for_login, (seconds,), {})


# Hosts that should join a tailnet, and when their URLs were shown, which starts their time limit.
_members: set[str] = set()
_shown: dict[str, float] = {}
_lock = threading.Lock()


def _wait_for_login(
    state: State,
    host: Host,
    seconds: int,
) -> bool:
    """Wait for this host; the first call prints the URLs of all hosts. False: the time is over."""
    with _lock:
        if host.name not in _shown:
            asked = [each for each in state.inventory.get_active_hosts() if each.name in _members]
            found = dict(state.fact_pool.map(_look, asked))
            waiting = {
                name: of
                for name, of in found.items()
                if not of.is_connected and of.state != tailnet.NO_STATE
            }
            _show_urls({name: _where_to_go(of) for name, of in waiting.items()})
            _shown.update(dict.fromkeys(found, time.monotonic()))
    while not (now := _look(host)[1]).is_connected:
        reason = _given_up(now, time.monotonic() - _shown[host.name], seconds)
        if reason is not None:
            print(f"{host.name}: {reason}", file=sys.stderr)
            return False
        time.sleep(ASK_EVERY_SECONDS)
    return True


def _given_up(
    found: Tailnet,
    waited: float,
    seconds: int,
) -> str | None:
    """Return why the run stops waiting for a host; None: it continues to wait."""
    if found.state == tailnet.NO_STATE and waited > ANSWER_SECONDS:
        said = "; ".join(found.health) or "tailscaled does not say why"
        return f"it has its login, but its control server does not answer ({found.server}): {said}"
    return (
        f"not logged in within {seconds} s (tailscale_login_seconds)" if waited > seconds else None
    )


def _look(target: Host) -> tuple[str, Tailnet]:
    with ctx_host.use(target):
        fact_cache.forget(target)
        return target.name, target.get_fact(TailnetOfHost)


def _where_to_go(found: Tailnet) -> str:
    if found.state == tailnet.NEEDS_APPROVAL:
        return f"{found.admin_url} (waits for approval)"
    return found.login_url or "no URL yet; see `tailscale status` there"


def _show_urls(urls: dict[str, str]) -> None:
    if not urls:
        return
    width = max(map(len, urls))
    lines = [f"  {name:{width}}  {url}" for name, url in sorted(urls.items())]
    print(
        "\n".join(["", "Open these to log the hosts in:", "", *lines, ""]),
        file=sys.stderr,
        flush=True,
    )


@operation()
def preferences(deployment: Deployment) -> Iterator[str]:
    """Set the preferences that can be changed without a new login."""
    found = host.get_fact(TailnetOfHost)
    flags = tailnet.changed_flags(deployment, found) if found.is_connected else []
    if not flags:
        host.noop("they are as they should be")
        return
    yield f"tailscale set {shlex.join(flags)}"


@operation()
def switch_ssh(wanted: bool | None) -> Iterator[FunctionCommand | str]:
    """Turn Tailscale's own ssh server on or off, if the inventory sets it."""
    found = host.get_fact(TailnetOfHost)
    if wanted is None or not found.is_connected or found.runs_ssh == wanted:
        host.noop("it is as it should be")
    elif wanted and not found.has_ssh:
        yield FunctionCommand(_refuse_ssh, (), {})
    elif isinstance(host.connector, SSHConnector):
        yield FunctionCommand(ssh_switch.switch, (wanted,), {})
    else:
        # No connection of this run would end. If a person's connection would, Tailscale itself
        # refuses.
        yield f"tailscale set --ssh={str(wanted).lower()}"


def _refuse_ssh(state: State, host: Host) -> bool:
    print(
        f"{host.name}: tailscale_ssh: True, but its tailnet does not have Tailscale SSH:"
        f" {ssh_switch.POLICY_NEEDS}; or take tailscale_ssh out of the inventory",
        file=sys.stderr,
    )
    return False


@operation()
def serve(deployment: Deployment) -> Iterator[FunctionCommand]:
    """Serve these ports in the tailnet; stop serving other ports that an earlier deploy served.

    Foreign ports are not changed. A port that cannot be served does not stop the deploy.
    """
    found = host.get_fact(TailnetOfHost)
    plan = serve_ports.plan(deployment, found)
    for problem in plan.problems if found.is_connected else ():
        run_report.problem(host.name, problem)
    if not found.is_connected or not plan.has_changes:
        host.noop("it shows what it can")
        return
    yield FunctionCommand(serve_ports.carry_out, (plan,), {})


@operation()
def tell(deployment: Deployment) -> Iterator[str]:
    """Report warnings about the host in the last lines of the run; changes nothing."""
    found = host.get_fact(TailnetOfHost)
    if found.is_connected:
        for worry in found.worries(datetime.now(UTC), deployment):
            run_report.note(f"{host.name}: {worry}")
    host.noop("it is told at the end")
    yield from ()

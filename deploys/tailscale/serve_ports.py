"""Ports that a host serves in its tailnet with `tailscale serve`: planned and applied changes."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyinfra.api import StringCommand
from pyinfra.api.host import Host
from pyinfra.api.state import State

from deploys.inventory.schema import Deployment
from deploys.paths import ROOT
from deploys.pyinfra_ext import fact_cache, run_report
from deploys.tailscale.tailnet import Endpoint, Tailnet, written

# Ports that a deploy has served, one per line: only these does a deploy ever stop serving.
SERVED = ROOT / "tailscale-serve"
SERVE_SECONDS = 60
NO_HTTPS = (
    "its tailnet has no HTTPS certificates; enable them (Tailscale: DNS page of the admin console;"
    " a control server of your own may have none), or name the port in tailscale_serve_http"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes to the served ports of a host.

    `off`, `on`: ports that stop and start being served. `kept`: ports of an earlier deploy that
    stay. `problems`: why ports cannot be served.
    """

    off: Mapping[Endpoint, str]
    on: Mapping[Endpoint, str]
    kept: Mapping[Endpoint, str]
    problems: tuple[str, ...]
    is_recorded: bool

    @property
    def has_changes(self) -> bool:
        return bool(self.off or self.on) or not self.is_recorded


def plan(deployment: Deployment, found: Tailnet) -> Plan:
    """Return the changes to a host."""
    wanted = {
        (scheme, port): f"http://127.0.0.1:{local}"
        for scheme, ports in (
            ("https", deployment.tailscale_serve),
            ("http", deployment.tailscale_serve_http),
        )
        for port, local in ports.items()
    }
    off = {
        at: target
        for at, target in found.ours.items()
        if at not in wanted and found.serves.get(at) == target
    }
    # A port that changes from HTTP to HTTPS has been freed before.
    freed = {port for _, port in off}
    on = {at: target for at, target in wanted.items() if found.serves.get(at) != target}
    reasons = {at: _why_not(at, found, freed) for at in on}
    problems = tuple(f"{_key(at)}: {reason}" for at, reason in reasons.items() if reason)
    on = {at: target for at, target in on.items() if not reasons[at]}
    kept = {
        at: target
        for at, target in wanted.items()
        if at not in on and found.serves.get(at) == target
    }
    return Plan(off, on, kept, problems, found.ours == kept)


def _why_not(
    at: Endpoint,
    found: Tailnet,
    freed: set[int],
) -> str | None:
    """Return why nothing can be served there; None: it can."""
    scheme, port = at
    if scheme == "https" and not found.has_https:
        return NO_HTTPS
    use = found.ports.get(port)
    if use in ("http", "https"):
        if use != scheme and port not in freed:
            return (
                f"port {port} is used for {use} already; `tailscale serve --{use}={port} off`"
                " there, or another port"
            )
        there = found.serves.get(at)
        if there is not None and there != found.ours.get(at):
            command = f"tailscale serve --{scheme}={port} --set-path=/ off"
            return (
                f"port {port} shows {there} already, which no deploy has put there; `{command}`"
                " there, or another port"
            )
    elif use is not None:
        return (
            f"port {port} is a TCP forward to {use}; `tailscale serve --tcp={port} off` there, or"
            " another port"
        )
    return None


def _key(at: Endpoint) -> str:
    scheme, port = at
    return f"tailscale_serve{'' if scheme == 'https' else '_http'}: {port}"


def carry_out(
    state: State,
    host: Host,
    plan: Plan,
) -> bool:
    """Apply a plan. Failures are reported and not recorded as served."""
    shown = dict(plan.kept)
    for at, target in plan.off.items():
        if said := _refused(host, off_command(at)):
            run_report.problem(host.name, f"{_key(at)}: still shown: {said}")
            shown[at] = target
    for at, target in plan.on.items():
        scheme, port = at
        if said := _refused(host, f"tailscale serve --bg --{scheme}={port} {target}"):
            run_report.problem(host.name, f"{_key(at)}: not shown: {said}")
        else:
            shown[at] = target
    lines = " ".join(f"'{written(at)} {target}'" for at, target in sorted(shown.items()))
    record = f"printf '%s\\n' {lines} > {SERVED}" if shown else f"rm -f {SERVED}"
    done = host.run_shell_command(
        StringCommand(record), print_output=True, **fact_cache.arguments_of_facts(host)
    )
    return bool(done[0])


def off_command(at: Endpoint) -> str:
    """Return the command that stops serving `/`; other paths at that port are not ours."""
    scheme, port = at
    return f"tailscale serve --{scheme}={port} --set-path=/ off"


def _refused(host: Host, command: str) -> str:
    """Run a command; return its output if it fails, else ""."""
    limited = StringCommand(f"timeout {SERVE_SECONDS} {command} 2>&1 </dev/null")
    is_done, output = host.run_shell_command(limited, **fact_cache.arguments_of_facts(host))
    said = " ".join(line.strip() for line in output.stdout_lines if line.strip())
    return "" if is_done else said or f"`{command}` failed and said nothing"


# Shell commands for an uninstall: stop serving all our ports.
STOP_SERVING = (
    f"[ ! -e {SERVED} ] || while read -r port target; do"
    " case $port in http:*) at=--http=${port#http:};; *) at=--https=$port;; esac;"
    f" timeout {SERVE_SECONDS} tailscale serve $at --set-path=/ off >&2 </dev/null; done < {SERVED}"
)

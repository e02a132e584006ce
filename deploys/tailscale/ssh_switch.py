"""Turn Tailscale's own ssh server on or off without locking the operator out.

With it Tailscale answers port 22 of the host's tailnet addresses instead of sshd, and the tailnet's
policy decides who gets in. A connection through Tailscale ends at the switch, and a policy without
a matching rule locks everybody out. So the host reverts the switch unless a new connection confirms
it in time.
"""

import shlex
import sys
import time

from paramiko import SSHException
from pyinfra.api import StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host
from pyinfra.api.state import State

from deploys.pyinfra_ext import fact_cache, keepalive
from worker.log import printable

CONFIRM_SECONDS = 30
# Delay before the switch, so that the answer to the command arrives over the connection that the
# switch ends.
DELAY_SECONDS = 2
# Time limit until the host can be reached again after it has reverted the switch.
RETURN_SECONDS = 30
# Time limit of a switch that fails, including slow attempts to connect.
LONGEST_SECONDS = 180
UNIT = "hivewright-tailscale-ssh"
FOLDER = f"/run/{UNIT}"
POLICY_NEEDS = (
    "the tailnet's policy needs an `ssh` rule that accepts whoever deploys (`src`), this host or"
    " its tags (`dst`) and the user that logs in (`users`)"
)


def switch_script(is_on: bool) -> str:
    """Return shell commands that make the host switch, and revert unless `confirm_script` runs.

    A systemd unit does it, which survives the end of the connection and reverts at a shutdown too.
    """
    switch = f"{FOLDER}/tailscale set --ssh={_flag(is_on)} >{FOLDER}/said 2>&1"
    confirmed = (
        f"for second in $(seq {CONFIRM_SECONDS}); do [ ! -e {FOLDER}/confirmed ] || exit 0; sleep"
        " 1; done"
    )
    start = f"sleep {DELAY_SECONDS}; {switch} && touch {FOLDER}/switched && {{ {confirmed}; }}"
    back = f"[ -e {FOLDER}/confirmed ] || {FOLDER}/tailscale set --ssh={_flag(not is_on)}"
    # systemd expands $ in its commands by itself.
    quoted = [shlex.quote(script.replace("$", "$$")) for script in (start, back)]
    return (
        f"umask 077; ! systemctl is-active --quiet {UNIT} || systemctl stop {UNIT}; rm -rf"
        f" {FOLDER}; mkdir {FOLDER} && ln -s $(command -v tailscale) {FOLDER}/tailscale &&"
        f" systemd-run --quiet --collect --unit={UNIT} --property=After=tailscaled.service"
        f" --property=ExecStopPost={shlex.quote('/bin/sh -c ' + quoted[1])} /bin/sh -c {quoted[0]}"
    )


def confirm_script(is_on: bool) -> str:
    """Return shell commands that keep the switch, and fail unless it is kept."""
    return (
        f"touch {FOLDER}/confirmed; while systemctl is-active --quiet {UNIT}; do sleep 0.2; done;"
        f" tailscale debug prefs | grep -q '\"RunSSH\": *{_flag(is_on)}'"
    )


# Prints the state of the switch: `switched`, `waits`, or its error message.
_LOOK = (
    f"if [ -e {FOLDER}/switched ]; then echo switched;"
    f" elif systemctl is-active --quiet {UNIT}; then echo waits; else cat {FOLDER}/said; fi"
)


def switch(
    state: State,
    host: Host,
    is_on: bool,
) -> bool:
    """Switch, and keep it if a new connection reaches the host. False: it was reverted."""
    if not _told(host, switch_script(is_on)):
        return False
    time.sleep(DELAY_SECONDS + 1)
    deadline = time.monotonic() + CONFIRM_SECONDS
    reason = "no new connection"
    while time.monotonic() < deadline:
        try:
            keepalive.renew(host)
            said = _answer(host, _LOOK)
            if said == "switched":
                # That connection may be older than the switch; this one is new.
                keepalive.renew(host)
                if _told(host, confirm_script(is_on)):
                    return True
            elif said != "waits":
                print(
                    f"{host.name}: tailscale set --ssh={_flag(is_on)}: {printable(said)}",
                    file=sys.stderr,
                )
                return False
        except (ConnectError, OSError, SSHException) as error:
            reason = str(error)
        time.sleep(1)
    _report_way_back(host, is_on, reason)
    return False


def _report_way_back(
    host: Host,
    is_on: bool,
    reason: str,
) -> None:
    """Wait until the host can be reached again, and print what happened and what to do."""
    way_back = (
        f"could not be reached yet; it switches back by itself {CONFIRM_SECONDS} s after the switch"
    )
    deadline = time.monotonic() + RETURN_SECONDS
    while time.monotonic() < deadline:
        try:
            keepalive.renew(host)
            way_back = "was switched back, and can be reached as before"
            break
        except (ConnectError, OSError, SSHException):
            time.sleep(1)
    needs = POLICY_NEEDS if is_on else "the host's own sshd must let in whoever deploys"
    print(
        f"{host.name}: tailscale_ssh: {is_on} would lock this side out: within {CONFIRM_SECONDS} s"
        f" no new connection got through ({reason}). The host {way_back}. To have it, {needs}; else"
        " take tailscale_ssh out of the inventory",
        file=sys.stderr,
    )


def _told(host: Host, script: str) -> bool:
    done = host.run_shell_command(
        StringCommand(script), print_output=True, **fact_cache.arguments_of_facts(host)
    )
    return bool(done[0])


def _answer(host: Host, script: str) -> str:
    _, output = host.run_shell_command(StringCommand(script), **fact_cache.arguments_of_facts(host))
    return " ".join(output.stdout_lines)


def _flag(value: bool) -> str:
    return "true" if value else "false"

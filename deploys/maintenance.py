"""Maintenance of a host between deploys: services, moving identities, uninstalling.

Each operation is run by itself through pyinfra's command line (deploys/fleet/commands.py).
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from pyinfra.api import StringCommand, operation

from deploys import locks
from deploys.backup_pack import WORKER_FOLDERS
from deploys.node_identity import standard_input
from deploys.paths import (
    CACHE,
    COMMAND,
    CONFIGURATION,
    DEPLOYED,
    LOGS,
    RETIRED,
    ROOT,
    STATE,
    USER,
    WHOLE,
)
from deploys.services import BACKED_UP
from deploys.tailscale.serve_ports import STOP_SERVING
from deploys.units import REMOVE_OURS
from deploys.wireguard import LEAVE
from deploys.worker import KEPT
from worker.runtime.state_dir import StateDir

# Every service that a deploy has started here; systemd orders them.
_UNITS = f"$(ls {DEPLOYED} 2>/dev/null | grep -v '^{WHOLE}$')"
# Digests of the workers that a move has stopped, and marks of those that ran, to restore them if
# the move fails.
_MOVED = DEPLOYED / ".moved"
ACTIONS = ("start", "stop", "restart")


@operation()
def services(
    action: str,
    unit: str = "*",
) -> Iterator[str]:
    """Start, stop or restart services: all, or those that `unit` matches (worker@0, worker@*).

    A stopped service starts again when the host boots or is deployed.
    """
    if action not in ACTIONS:
        raise ValueError(f"action: got {action!r}; expected one of {', '.join(ACTIONS)}")
    pattern = shlex.quote(f"hivewright-{unit}.service")
    yield locks.held(
        f"pattern={pattern}; all={_UNITS}; units=;"
        " [ -n \"$all\" ] || { echo 'nothing is deployed on this host' >&2; exit 1; };"
        ' for unit in $all; do case $unit in $pattern) units="$units $unit";; esac; done;'
        ' [ -n "$units" ] || { echo "no such service: $pattern; it has" $all >&2; exit 1; };'
        f" systemctl reset-failed $units 2>/dev/null; systemctl {action} $units"
    )


@operation()
def uninstall(identities: bool) -> Iterator[str]:
    """Remove hivewright from the host.

    Without `identities`, keys, tokens, ledgers and the chain stay, since nothing can recreate them.
    Debian packages stay: other programs may use them.
    """
    yield locks.held(
        f'units={_UNITS}; [ -z "$units" ] || systemctl disable --now --quiet $units;'
        f" {REMOVE_OURS}; rm -f {COMMAND}; systemctl daemon-reload; {LEAVE}; {STOP_SERVING};"
        f" rm -rf {ROOT} {CONFIGURATION} {CACHE} {LOGS}"
    )
    if identities:
        yield f"rm -rf {STATE}; ! id {USER} >/dev/null 2>&1 || userdel {USER}"
    else:
        kept = " ".join(f"! -name '{name}'" for name in KEPT)
        others = " ".join(f"! -name {name}" for name in ("worker-*", RETIRED.name, *BACKED_UP))
        yield (
            f"! cd {STATE} 2>/dev/null || {{ find . -mindepth 1 -maxdepth 1 {others} -exec rm -rf"
            f" {{}} +; find . -mindepth 2 -maxdepth 2 -path './worker-*' {kept} -exec rm -rf {{}}"
            " +; }"
        )


# Files with a slot's identity, which a move sets aside.
_IDENTITY = " ".join(
    (*WORKER_FOLDERS, StateDir.identity, StateDir.enrolment, StateDir.account_token)
)


@operation()
def retire() -> Iterator[str]:
    """Stop all workers and set their keys aside: their identities move to another host."""
    aside = f"for f in {_IDENTITY}; do [ ! -e $f ] || mv -T $f $f.moved; done"
    yield locks.held(
        f"set -e; mkdir -p -m 700 {_MOVED};"
        f" for d in {STATE}/worker-*; do [ -e $d/swarm.pem ] || continue;"
        " unit=hivewright-worker@${d##*-}.service;"
        f" ! systemctl is-active --quiet $unit || touch {_MOVED}/$unit.ran;"
        " systemctl disable --now --quiet $unit;"
        # As the services' user: root would follow that user's links out of the folder.
        f" d=$d runuser -u {USER} -- sh -euc 'cd $d; {aside}';"
        f" for digest in $unit {WHOLE}; do"
        f" [ ! -e {DEPLOYED}/$digest ] || mv -T {DEPLOYED}/$digest {_MOVED}/$digest; done; done"
    )


@operation()
def take_back() -> Iterator[str]:
    """Undo `retire`: put the workers' keys back, and start those that ran."""
    back = f"for f in {_IDENTITY}; do [ ! -e $f.moved ] || mv -T $f.moved $f; done"
    yield locks.held(
        f"set -e; for d in {STATE}/worker-*; do [ -e $d/swarm.pem.moved ] || continue; [ ! -e"
        ' $d/swarm.pem ] || { echo "slot ${d##*-} has another key by now: $d/swarm.pem" >&2;'
        f" exit 1; }}; d=$d runuser -u {USER} -- sh -euc 'cd $d; {back}';"
        f" unit=hivewright-worker@${{d##*-}}.service; [ ! -e {_MOVED}/$unit ] || mv -T"
        f" {_MOVED}/$unit {DEPLOYED}/$unit; systemctl enable --quiet $unit; [ ! -e"
        f" {_MOVED}/$unit.ran ] || systemctl start $unit; rm -f {_MOVED}/$unit.ran; done; [ ! -e"
        f" {_MOVED}/{WHOLE} ] || mv -T {_MOVED}/{WHOLE} {DEPLOYED}/{WHOLE}; rm -rf {_MOVED}"
    )


@operation()
def check_restore() -> Iterator[StringCommand]:
    """Fail if the host would refuse a backup; a tar with its keys is on standard input, in base64.

    The tar also goes through standard input on the host, so it is in no command line, log or diff.
    A host that has another identity, or runs a worker with one of these, refuses.
    """
    script = restore_script(STATE, is_question=True)
    yield StringCommand(locks.held(script), _stdin=[standard_input()])


def restore_script(
    state: Path,
    content: str = "base64 -d",
    *,
    is_question: bool = False,
) -> str:
    """Return shell commands that unpack a tar into the state folder; existing files stay.

    `content`: the command that prints the tar. `is_question`: only check, and fail if it would be
    refused. The services' user unpacks it, because entries of folder or archive may be links.
    """
    make_user = (
        f"useradd --system --no-create-home --home-dir {state} --shell /usr/sbin/nologin {USER}"
    )
    if is_question:
        make_user = "user=nobody"
    check = f"""set -e
user={USER}
id $user >/dev/null 2>&1 || {make_user}
new=$(mktemp -d)
placed=$(mktemp)
trap 'while read -r file; do as_user rm -f "$file"; done < $placed; rm -rf $new $placed' EXIT
as_user() {{ (umask 077 && cd $new && exec runuser -u $user -- "$@"); }}
chown $user $new
{content} | as_user tar -x
for d in $new/worker-*; do
  [ -e $d/swarm.pem ] || continue
  n=${{d##*-}}
  here={state}/worker-$n
  ! systemctl is-active --quiet hivewright-worker@$n.service || {{
    echo "slot $n runs; stop it first: hivewright fleet stop --unit worker@$n" >&2; exit 1; }}
  [ ! -e $here/swarm.pem ] || as_user cmp -s $d/swarm.pem $here/swarm.pem || {{
    echo "slot $n has an identity of its own ($here/swarm.pem); move it away first" >&2; exit 1; }}
done
"""
    if is_question:
        return check
    return f"""{check}install -d -m 755 {state} {state}/{RETIRED.name}
cd $new
kept={RETIRED.name}
for folder in worker-* {" ".join(BACKED_UP)} $kept/worker-* $kept/coordinator-*; do
  [ -d "$folder" ] || continue
  find "$folder" ! -type d | while read -r file; do
    [ -e "{state}/$file" ] || [ -L "{state}/$file" ] || echo "{state}/$file"; done >> $placed
  [ -d "{state}/$folder" ] || install -d -m 700 -o {USER} -g {USER} "{state}/$folder"
  as_user cp -rn "$folder/." "{state}/$folder/"
done
: > $placed
"""

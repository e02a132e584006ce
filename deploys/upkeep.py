"""What is done to a deployed host between deploys: services, moving identities in and out, taking it all away.

Each operation is run by itself through pyinfra's command line (deploys/fleet/upkeep.py).
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pyinfra.api import StringCommand, operation

from deploys.facts import CACHE, COMMAND, DEPLOYED, LOGS, ROOT, WHOLE
from deploys.places import CONFIGURATION, RETIRED, STATE
from deploys.sealing import SERVICE_FOLDERS, WORKER_FOLDERS
from deploys.system import USER
from deploys.tailscale import STOP_SERVING
from deploys.units import REMOVE_OURS
from deploys.wireguard import LEAVE
from deploys.worker import KEPT

# Every service that a deploy has started here. systemd puts them into order.
_UNITS = f"$(ls {DEPLOYED} 2>/dev/null | grep -v '^{WHOLE}$')"
ACTIONS = ("start", "stop", "restart")


@operation()
def services(action: str) -> Iterator[str]:
    """Start, stop or restart all of hivewright's services. A stopped one starts again with the host, or a deploy."""
    if action not in ACTIONS:
        raise ValueError(f"action: got {action!r}; expected one of {', '.join(ACTIONS)}")
    yield (
        f"units={_UNITS}; [ -n \"$units\" ] || {{ echo 'nothing is deployed on this host' >&2; exit 1; }};"
        f" systemctl reset-failed $units 2>/dev/null; systemctl {action} $units"
    )


@operation()
def uninstall(identities: bool) -> Iterator[str]:
    """Have nothing of hivewright's. What can't be made again (keys, tokens, ledgers, the chain) stays without
    `identities`. The host's packages stay: others may use them."""
    yield (
        f'units={_UNITS}; [ -z "$units" ] || systemctl disable --now --quiet $units;'
        f" {REMOVE_OURS}; rm -f {COMMAND}; systemctl daemon-reload; {LEAVE}; {STOP_SERVING};"
        f" rm -rf {ROOT} {CONFIGURATION} {CACHE} {LOGS}"
    )
    if identities:
        yield f"rm -rf {STATE}; ! id {USER} >/dev/null 2>&1 || userdel {USER}"
    else:
        kept = " ".join(f"! -name '{name}'" for name in KEPT)
        others = " ".join(f"! -name {name}" for name in ("worker-*", RETIRED.name, *SERVICE_FOLDERS))
        yield (
            f"! cd {STATE} 2>/dev/null || {{ find . -mindepth 1 -maxdepth 1 {others} -exec rm -rf {{}} +;"
            f" find . -mindepth 2 -maxdepth 2 -path './worker-*' {kept} -exec rm -rf {{}} +; }}"
        )


@operation()
def retire() -> Iterator[str]:
    """Have no worker here that could claim an identity that has moved: stopped, its key set aside."""
    files = " ".join((*WORKER_FOLDERS, "swarm.pem", "enrolment.json", "account.token"))
    aside = f"for f in {files}; do [ ! -e $f ] || mv -T $f $f.moved; done"
    yield (
        f"set -e; for d in {STATE}/worker-*; do [ -e $d/swarm.pem ] || continue;"
        " systemctl disable --now --quiet hivewright-worker@${d##*-}.service;"
        # As its user: root would follow a link of his out of there.
        f" d=$d runuser -u {USER} -- sh -euc 'cd $d; {aside}';"
        f" rm -f {DEPLOYED}/hivewright-worker@${{d##*-}}.service {DEPLOYED}/{WHOLE}; done"
    )


@operation()
def restore() -> Iterator[StringCommand]:
    """Have the identities and ledgers of a backup: a tar in base 64, which comes on standard input.

    They go through the standard input of a shell on the host too, so they are in no command line, log or diff. Nothing
    that is there is overwritten, and a host that has another identity, or runs one of these, is refused.
    """
    yield StringCommand(restore_script(STATE), _stdin=[_standard_input()])


@cache
def _standard_input() -> str:
    """pyinfra runs an operation twice: to see what it would do, and to do it."""
    return sys.stdin.read()


def restore_script(state: Path) -> str:
    """Shell commands that put what comes, a tar in base 64 on standard input, into the folder of all state.

    Its user unpacks it and puts it in place: what stands in his folders, or in the archive, may be links.
    """
    return f"""set -e
id {USER} >/dev/null 2>&1 || useradd --system --no-create-home --home-dir {state} --shell /usr/sbin/nologin {USER}
new=$(mktemp -d)
trap 'rm -rf $new' EXIT
chown {USER}:{USER} $new
as_user() {{ (umask 077 && cd $new && exec runuser -u {USER} -- "$@"); }}
base64 -d | as_user tar -x
for d in $new/worker-*; do
  [ -e $d/swarm.pem ] || continue
  n=${{d##*-}}
  here={state}/worker-$n
  ! systemctl is-active --quiet hivewright-worker@$n.service || {{ echo "slot $n runs; stop it first" >&2; exit 1; }}
  [ ! -e $here/swarm.pem ] || as_user cmp -s $d/swarm.pem $here/swarm.pem || {{
    echo "slot $n has an identity of its own ($here/swarm.pem); move it away first" >&2; exit 1; }}
done
install -d -m 755 {state} {state}/{RETIRED.name}
cd $new
for folder in worker-* {" ".join(SERVICE_FOLDERS)} {RETIRED.name}/worker-*; do
  [ -d "$folder" ] || continue
  [ -d "{state}/$folder" ] || install -d -m 700 -o {USER} -g {USER} "{state}/$folder"
  as_user cp -rn "$folder/." "{state}/$folder/"
done
"""

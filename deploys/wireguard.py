"""WireGuard between the hosts: each makes its own key, and the inventory determines its peers.

Only public keys leave a host. The operator's side stores them, because a run that is limited to
some hosts needs the keys of the others.
"""

import base64
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from pyinfra import host, inventory, state
from pyinfra.api import StringCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from deploys import mesh, operator, system
from deploys.facts import WireGuard
from deploys.inventory.commits import CHECKOUT
from deploys.inventory.host_plan import Planned
from deploys.mesh import CONFIGURATION, DROP_IN, FOLDER, KEY, RELOAD, UNIT, Member
from deploys.pyinfra_ext import run_report

PACKAGES = ("wireguard-tools", "wireguard-go")


@deploy("WireGuard")
def join_mesh(plan: Planned) -> None:
    """Connect the host to the mesh, or remove it from the mesh, as the inventory says."""
    me = plan.mesh.get(host.name)
    if me is None:
        leave(name="Have none of it")
        return
    # A kernel without WireGuard (in a container, or an old one) needs the user-space program.
    has_module = host.get_fact(WireGuard).kernel
    names = PACKAGES[:1] if has_module else PACKAGES
    system.packages(name="Install it", names=names, _timeout=system.INSTALL_SECONDS)
    make_key(name="Make the host's key")
    secrets = CHECKOUT / plan.host.deployment.secrets_dir
    connect(name="Connect it to its peers", me=me, members=plan.mesh, secrets=secrets)


@operation()
def make_key() -> Iterator[str]:
    """Make the host's key, which never leaves the host."""
    if host.get_fact(WireGuard).public_key is not None:
        host.noop("it has one")
        return
    yield f"umask 077 && mkdir -p {FOLDER} && wg genkey > {KEY}.new && mv {KEY}.new {KEY}"


@operation()
def connect(
    me: Member,
    members: Mapping[str, Member],
    secrets: Path,
) -> Iterator[StringCommand]:
    """Start the interface with those of the host's peers whose keys are known."""
    found = host.get_fact(WireGuard)
    # The host keeps peers whose keys this machine does not know, from another operator's machine.
    keys = {**found.peers, **_public_keys(secrets, members)}
    missing = sorted(members.keys() - keys.keys())
    if missing and state.is_executing:
        run_report.note(
            f"WireGuard: no key of {', '.join(missing)} is known yet; deploy them, then the others"
            " again"
        )
    text = mesh.configuration(me, members.values(), keys)
    if found.runs and found.digest == mesh.digest(text):
        host.noop("it is connected")
        return
    drop_in = f"mkdir -p {DROP_IN.parent} && cat > {DROP_IN} && systemctl daemon-reload"
    yield _write(drop_in, RELOAD, "022")
    yield _write(_APPLY, text, "077")


def _write(
    script: str,
    text: str,
    umask: str,
) -> StringCommand:
    encoded = base64.b64encode(text.encode()).decode()
    return StringCommand(f"umask {umask}; base64 -d | {{ {script}\n}}", _stdin=[encoded])


# Changed peers are reloaded; for other changes the interface is stopped with the old configuration.
_APPLY = f"""set -e
cat > {CONFIGURATION}.new
above() {{ sed '/^\\[Peer\\]/,$d' $1; }}
if systemctl is-active --quiet {UNIT} \\
  && [ "$(above {CONFIGURATION})" = "$(above {CONFIGURATION}.new)" ]; then
  mv {CONFIGURATION}.new {CONFIGURATION}
  systemctl reload {UNIT}
else
  systemctl stop {UNIT}
  mv {CONFIGURATION}.new {CONFIGURATION}
  systemctl start {UNIT} || {{
    journalctl --no-pager --quiet --output=cat --lines=15 --unit={UNIT} >&2
    exit 1
  }}
fi
systemctl enable --quiet {UNIT}
"""


@operation()
def leave() -> Iterator[str]:
    """Remove interface, configuration and key of the mesh."""
    if not host.get_fact(WireGuard).is_there:
        host.noop("the host is in no mesh")
        return
    yield LEAVE


LEAVE = (
    f"! systemctl cat {UNIT} >/dev/null 2>&1 || systemctl disable --now --quiet {UNIT};"
    f" rm -rf {CONFIGURATION} {KEY} {DROP_IN.parent}; systemctl daemon-reload"
)

# Public keys of all hosts of the run, queried together when the first host needs them: once before
# any change (False), and once more during the run (True).
_asked: dict[bool, dict[str, str]] = {}
_lock = threading.Lock()


def _public_keys(
    secrets: Path,
    members: Mapping[str, Member],
) -> dict[str, str]:
    """Return public keys by host: current ones for hosts of this run, otherwise the last known."""
    with _lock:
        if state.is_executing not in _asked:
            hosts = [each for each in inventory.get_active_hosts() if each.name in members]
            answers = dict(state.fact_pool.map(_public_key, hosts))
            found = {name: key for name, key in answers.items() if key}
            if state.is_executing:
                known = operator.remember_public_keys(secrets, found)
            else:
                known = operator.public_keys(secrets) | found
            _asked[state.is_executing] = known
    return {name: key for name, key in _asked[state.is_executing].items() if name in members}


def _public_key(target: Host) -> tuple[str, str | None]:
    with ctx_host.use(target):
        return target.name, target.get_fact(WireGuard).public_key

"""Paths on a host. Below these is what a deploy reads or writes there.

WireGuard (mesh.py) and Tailscale (tailscale/) have paths of their own.
"""

from pathlib import Path

from worker.runtime.running_release import ROLLED_BACK_FILE
from worker.runtime.state_dir import StateDir

# The services' user and group.
USER = "hivewright"

ROOT = Path("/opt/hivewright")
RELEASES = ROOT / "releases"
ENVIRONMENTS = ROOT / "environments"
ANVILS = ROOT / "anvil"
# Files shipped to a host without internet, named by their digest; for each environment, the wheels
# that it is made of.
SHIPPED = ROOT / "shipped"
WHEELS = ROOT / "wheels"
CURRENT = ROOT / "current"
ANVIL = CURRENT / "anvil/anvil"
# The host's state before its last deploy: settings, units, digests, and the current release.
PREVIOUS = ROOT / "previous"
# The reason of the host's last rollback (worker/runtime/running_release.py reads it).
ROLLED_BACK = ROOT / ROLLED_BACK_FILE
COMMAND = Path("/usr/local/bin/hivewright")

CONFIGURATION = Path("/etc/hivewright")
ENROLMENT_TOKEN = CONFIGURATION / "enrolment.token"

STATE = Path("/var/lib/hivewright")
# On a coordinator: the fleet's targets for a Prometheus there, whose user may read them.
PROMETHEUS = STATE / "prometheus"
TARGETS_FILE = "targets.json"
# For each running service, a digest of unit, settings, secrets and release at its start.
DEPLOYED = STATE / "deployed"
# In DEPLOYED, the digest of the whole host, written at the end of a complete deploy.
WHOLE = "host"
# State of slots and coordinators that the inventory no longer has: identities and ledgers.
RETIRED = STATE / "retired"
# In the state folder of a slot: its identity.
KEY_FILE = StateDir.identity

CACHE = Path("/var/cache/hivewright")
# Models, read by all slots of a host.
MODELS = CACHE / "models"
LOGS = Path("/var/log/hivewright")

UNITS = Path("/etc/systemd/system")
# In /run: a host that boots again is unlocked.
LOCK = Path("/run/hivewright.lock")


def state_dir(slot: int) -> Path:
    """Return the state folder of a slot."""
    return STATE / f"worker-{slot}"


def market_record(slot: int) -> Path:
    """Return the file with a slot's bets in the prediction market, next to its log."""
    return LOGS / f"worker-{slot}/prg_record.txt"


def settings_file(role: str) -> Path:
    """Return the settings file of a role (`keeper`), or of a slot's worker (`worker-0`)."""
    return CONFIGURATION / f"{role}.yaml"


def credential(
    service: str,
    name: str = ENROLMENT_TOKEN.name,
) -> str:
    """Return the path of a service's own copy of a secret (LoadCredential)."""
    return f"/run/credentials/hivewright-{service}.service/{name}"

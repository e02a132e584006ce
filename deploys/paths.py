"""Where things are on a host."""

from pathlib import Path

STATE = Path("/var/lib/hivewright")
CONFIGURATION = Path("/etc/hivewright")
# What is kept of a slot that the inventory no longer has: its identity and its books, by peer id.
RETIRED = STATE / "retired"
# Models, for all slots of a host: they only read it.
MODELS = Path("/var/cache/hivewright/models")


def state_dir(slot: int) -> Path:
    """The state folder of a slot."""
    return STATE / f"worker-{slot}"

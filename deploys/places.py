"""Where things are on a host."""

from pathlib import Path

STATE = Path("/var/lib/hivewright")
CONFIGURATION = Path("/etc/hivewright")
# What is kept of a slot that the inventory no longer has: its identity and its books, by peer id.
RETIRED = STATE / "retired"


def state_dir(slot: int) -> Path:
    """The state folder of a slot."""
    return STATE / f"worker-{slot}"

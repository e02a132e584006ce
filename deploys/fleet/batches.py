"""The order of a rollout: a canary, then the coordinator, then batches.

The canary is one worker, so that a bad release affects only one host. A coordinator that runs
nothing yet comes first, because no worker can train without it.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from worker.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Size:
    """A number of hosts, or a percentage of the fleet."""

    value: int
    is_percent: bool = False

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Read "4" or "25%". Raises SettingsError."""
        match = re.fullmatch(r"([1-9]\d{0,4})(%?)", text)
        if match is None or (match[2] and int(match[1]) > 100):
            raise SettingsError(
                f"--batch: got {text!r}; expected a number of hosts, or 1% to 100% of them"
            )
        return cls(int(match[1]), bool(match[2]))

    def of(self, num_hosts: int) -> int:
        """Return the number of hosts, out of `num_hosts`; at least one."""
        return max(1, math.ceil(num_hosts * self.value / 100)) if self.is_percent else self.value


@dataclass(frozen=True, slots=True)
class Batch:
    """Hosts that are deployed at the same time. `kind`: canary, coordinator or batch."""

    kind: str
    hosts: tuple[str, ...]


def next_batch(
    pending: Sequence[str],
    done: Collection[str],
    coordinators: Collection[str],
    bare: Collection[str],
    size: Size,
) -> Batch | None:
    """Return the next hosts, None if none is left.

    `done`: hosts that passed the gate. `bare`: hosts with nothing deployed.
    """
    workers = [host for host in pending if host not in coordinators]
    hubs = [host for host in pending if host in coordinators]
    if hubs and (hubs[0] in bare or not workers or set(done) - set(coordinators)):
        return Batch("coordinator", (hubs[0],))
    if not workers:
        return None
    if not set(done) - set(coordinators):
        return Batch("canary", (workers[0],))
    return Batch("batch", tuple(workers[: size.of(len(pending) + len(done))]))

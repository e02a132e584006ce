"""Real peers on 127.0.0.1, each with its own libp2p daemon; all are closed when their test ends."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from worker import settings
from worker.records import Collected, Group, Place, Task, round_seed
from worker.swarm import identity
from worker.swarm.context import SwarmContext
from worker.swarm.exchange.verify import Verifier
from worker.swarm.network import Network
from worker.swarm.protocol import messages
from worker.swarm.requests import AskHandler
from worker.swarm.swarm import Swarm

GROUP_SIZE = 4


class Sums:
    """Tasks whose answer is "SEED+INDEX", exactly."""

    def __init__(self, version: str = "sums 1") -> None:
        self.versions = (version,)
        self.families = ("sum x",)

    def question(self, task: Task) -> str:
        return f"{task.seed}+{task.index}?"

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        return [1.0 if c == str(task.seed + task.index) else 0.0 for c in completions]


class TheseFirst(random.Random):
    """Draws some peers before all others."""

    first: frozenset[str] = frozenset()

    def choices(self, population, weights=None, **options):  # type: ignore[no-untyped-def]
        found = sorted(self.first.intersection(population))
        return found[:1] or super().choices(population, weights, **options)


def make_groups(peer_id: str, round: int, count: int = 9, part: int = 0) -> list[Group]:
    """Return the groups that an honest peer publishes."""
    seed, first = round_seed(peer_id, round), part * 256
    return [
        Group(Task("sum", "x", seed, i), (str(seed + i), "no idea", "", "\u00e9" * 100))
        for i in range(first, first + count)
    ]


def encode_ask(round: int, patience: int, member: bytes, owner: str = "") -> bytes:
    """Return a request for the groups of `round`."""
    return messages.encode_ask(messages.Ask(round, Place(round, 0), patience, member, owner))


def collect_all(swarms: list[Swarm], round: int, want: int) -> list[Collected]:
    """All collect at the same time."""
    results: dict[int, Collected] = {}
    threads = [
        threading.Thread(target=lambda i=i, s=s: results.update({i: s.collect(round, want)}))  # type: ignore[misc]
        for i, s in enumerate(swarms)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [results[i] for i in range(len(swarms))]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Return the seconds until `condition` was true; fail after three times `seconds`.

    Test machines are noisy.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > 3 * seconds:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - started


class Lab:
    """Makes peers in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[Swarm | Network] = []
        self.bootnodes: tuple[str, ...] = ()
        self.announce_every_seconds = 60.0
        self.host = "127.0.0.1"

    def folder(self, name: str) -> Path:
        """Return the peer's folder; its identity is created on the first call."""
        folder = self._folder / name
        if not folder.exists():
            identity.create(folder / "swarm.pem")
        return folder

    def peer(
        self, name: str, start: bool = True, version: str = "sums 1", **departures: object
    ) -> Swarm:
        section = self._section().model_copy(update=departures)
        folder = self.folder(name)
        swarm = Swarm(
            section, folder / "swarm.pem", folder, Verifier(Sums(version), section, GROUP_SIZE)
        )
        self._open.append(swarm)
        if start:
            swarm.start()
        return swarm

    def network(self, name: str, on_ask: AskHandler | None = None, **options: object) -> Network:
        """Return a bare network part: a bootnode, or a peer whose answers the test defines."""
        departures = {
            key: options.pop(key) for key in list(options) if key in settings.Swarm.model_fields
        }
        section = self._section().model_copy(update=departures)
        folder = self.folder(name)
        if on_ask is not None:
            options.setdefault("environments", ("sums 1",))
        context = SwarmContext(section, folder / "swarm.pem", folder, **options)  # type: ignore[arg-type]
        network = Network(context, on_ask)
        self._open.append(network)
        network.start()
        wait_until(lambda: network.context.is_up, 30, f"{name} is up")
        return network

    def _section(self) -> settings.Swarm:
        return settings.Swarm(
            host=self.host,
            bootnodes=self.bootnodes,
            collect_timeout_seconds=6.0,
            announce_every_seconds=self.announce_every_seconds,
        )

    def bootnode(self, name: str = "bootnode") -> Network:
        """One more, through which the peers that come after it join."""
        network = self.network(name, is_member=False, reachability="public", relay_others=True)
        self.bootnodes += multiaddrs(network)
        return network

    def close(self) -> None:
        for part in self._open:
            part.close()


def multiaddrs(network: Network) -> tuple[str, ...]:
    return tuple(f"{a}/p2p/{network.context.identity.peer_id}" for a in network.context.addresses)

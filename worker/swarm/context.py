"""The interface of `network.Network` for discovery and transport.

They get it as this interface, so that no layer imports the module that is built on it.
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from worker import settings
from worker.swarm.discovery.peer_cache import Cache
from worker.swarm.discovery.peer_table import Peers
from worker.swarm.identity import Identity
from worker.swarm.log_throttle import Rarely
from worker.swarm.protocol.messages import Member
from worker.swarm.transport.hole_punching import Talks
from worker.swarm.transport.streams import Stream


class SwarmContext(Talks, Protocol):
    """Only used in the network's event loop."""

    addresses: tuple[str, ...]
    bootnodes: list[str]
    foreign_bootnodes: set[str]

    @property
    def identity(self) -> Identity: ...

    @property
    def swarm(self) -> settings.Swarm: ...

    @property
    def is_member(self) -> bool: ...

    @property
    def peers(self) -> Peers: ...

    @property
    def cache(self) -> Cache: ...

    @property
    def rng(self) -> random.Random: ...

    @property
    def said(self) -> Rarely: ...

    @property
    def wake(self) -> asyncio.Event:
        """Set: look for peers now."""

    @property
    def has_contact(self) -> bool | None:
        """True if a member spoke to us lately; None: nobody was asked for long enough to tell."""

    def member(self) -> Member:
        """Return our own record, fresh enough to be shown."""

    def stream(
        self, peer_id: str, addresses: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[Stream]:
        """Open a stream to a peer. Raises what streams.UNREACHABLE names."""

    def hear(self, peer_id: str) -> None:
        """Note that a member spoke to us."""

    def learn(self, sealed: bytes, sender: str) -> Member:
        """Take in a record that `sender` showed. Raises BadRecord."""

    def save_cache(self) -> None:
        """Write down where peers are, for the next start."""

"""The discovery loop: dial known addresses, read and announce records, greet peers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence

from worker.errors import BadRecord, SwarmError
from worker.multiaddr import is_peer_id, split_peer
from worker.swarm.context import SwarmContext
from worker.swarm.discovery.dht import Membership
from worker.swarm.discovery.peer_table import MAX_PEERS_CACHED
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import Kind, OtherVersion, Refused
from worker.swarm.transport.connections import Connections
from worker.swarm.transport.daemon import PROTOCOL, Daemon, speaks_otherwise
from worker.swarm.transport.hole_punching import HolePunching
from worker.swarm.transport.streams import ANSWER_TIMEOUT_SECONDS, UNREACHABLE

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
ALONE_PAUSE_SECONDS = 10.0
NUM_GREETINGS = 8
DEAF_AFTER = 5
"""The daemon is restarted after this many consecutive turns without an answer to our DHT node.

In such a turn connected peers answered our greetings, but not our DHT node.
"""


class DiscoveryLoop:
    """The loop during one run of the daemon. `run` ends only with an exception."""

    def __init__(
        self,
        context: SwarmContext,
        connections: Connections,
        daemon: Daemon,
        membership: Membership,
    ) -> None:
        self._context = context
        self._connections = connections
        self._peers = context.peers
        self._rng = context.rng
        self._daemon = daemon
        self._membership = membership
        self._hole_punching = HolePunching(connections, daemon)
        self._announce_at = 0.0

    async def run(self) -> None:
        context, membership = self._context, self._membership
        pause, num_deaf = FIRST_PAUSE_SECONDS, 0
        while True:
            had_neighbours = membership.num_neighbours > 0
            num_spoke = await self._reach_out()
            num_deaf = num_deaf + 1 if num_spoke and not membership.num_neighbours else 0
            if num_deaf >= DEAF_AFTER:
                raise SwarmError(
                    f"DHT node gets no answer from {num_spoke} peers that answer the daemon"
                )
            try:
                if await self._has_moved() or (membership.num_neighbours and not had_neighbours):
                    self._announce_at = 0.0
                await self._use_dht()
            except TimeoutError:
                log.debug("daemon or DHT gave no answer in time")
            contacts = self._list_contacts()
            await self._converse(await self._hole_punching.drop_relayed(contacts), contacts)
            await self._converse(self._peers.to_greet(self._rng, NUM_GREETINGS))
            context.save_cache()
            longest = context.swarm.announce_every_seconds
            if not context.has_contact or not len(self._peers):
                longest = min(longest, ALONE_PAUSE_SECONDS)
            pause = FIRST_PAUSE_SECONDS if context.wake.is_set() else min(2 * pause, longest)
            context.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * self._rng.uniform(0.75, 1.25)):
                    await context.wake.wait()

    async def _has_moved(self) -> bool:
        """Return whether libp2p has other addresses for us than before, such as one at a relay."""
        addresses = await self._daemon.find_addresses()
        moved = addresses != self._context.addresses
        if moved:
            log.info("addresses changed addresses=%s", ",".join(addresses))
            self._context.addresses = addresses
        return moved

    async def _use_dht(self) -> None:
        """Renew our record when it is due, and read those of others. Raises TimeoutError."""
        context = self._context
        if time.monotonic() >= self._announce_at:
            await self._membership.look_around()
            if context.is_member:
                await self._membership.announce(context.member())
            self._announce_at = time.monotonic() + context.swarm.announce_every_seconds
        for member in await self._membership.read(self._rng):
            context.learn(member.sealed, sender="")

    async def _reach_out(self) -> int:
        """Dial known addresses of peers that we are not connected to; return how many answered.

        Without any connection it dials all bootnodes, otherwise a few peers, so that separated
        parts of the swarm find each other again.
        """
        context, peers = self._context, self._peers
        contacts = self._list_contacts()
        bootnodes = [
            p for p in _by_peer((*context.bootnodes, *context.cache.bootnodes)) if p in contacts
        ]
        connected = await self._daemon.connections()
        missing = [p for p in contacts if p not in connected]
        if not connected:
            others = [p for p in missing if p not in bootnodes]
            num_others = min(NUM_GREETINGS, len(others))
            targets = [*bootnodes, *self._rng.sample(others, num_others)]
        else:
            targets = self._rng.sample(missing, min(2, len(missing)))
            # Peers that connected before they could answer a greeting; bootnodes only while there
            # are no others.
            lonely = not self._membership.num_neighbours or not len(peers)
            known = [p for p in contacts if p in connected and (lonely or not peers.knows(p))]
            targets += [p for p in known if lonely or p not in bootnodes][:NUM_GREETINGS]
        return await self._converse(targets, contacts)

    def _list_contacts(self) -> dict[str, list[str]]:
        """Return the addresses of bootnodes and of the peers heard last (in any run), by peer."""
        context = self._context
        cached = (*context.cache.peers, *context.cache.bootnodes)
        contacts = _by_peer(
            [*context.bootnodes, *cached, *self._peers.multiaddrs(MAX_PEERS_CACHED)]
        )
        contacts.pop(context.identity.peer_id, None)
        return contacts

    async def _converse(
        self, peer_ids: Iterable[str], contacts: dict[str, list[str]] | None = None
    ) -> int:
        """Greet peers concurrently; return how many answered."""
        addresses = contacts or {}
        greetings = [self._greet(p, addresses.get(p, ())) for p in peer_ids]
        return sum(await asyncio.gather(*greetings))

    def _note_foreign(self, peer_id: str) -> None:
        """Record and log that a bootnode is a plain libp2p or hivemind node, not hivewright's."""
        context = self._context
        if peer_id not in _by_peer((*context.bootnodes, *context.cache.bootnodes)):
            return
        context.foreign_bootnodes.add(peer_id)
        if not context.throttle.has((peer_id, "foreign")):
            log.warning(
                "bootnode answers, but is not hivewright's (no %s): no peers are found through it"
                " bootnode=%s; name a hivewright bootnode in swarm.bootnodes",
                PROTOCOL,
                peer_id,
            )

    async def _greet(
        self,
        peer_id: str,
        addresses: Sequence[str],
    ) -> bool:
        """Send our record to a peer and learn which peers it knows.

        Return False if it was not reached or sent invalid data.
        """
        context = self._context
        try:
            async with (
                self._connections.stream(peer_id, addresses) as stream,
                asyncio.timeout(ANSWER_TIMEOUT_SECONDS),
            ):
                own = context.member().sealed if context.is_member else b""
                await stream.send(messages.encode_frame(Kind.HELLO, own))
                kind, payload = await stream.receive(
                    messages.MAX_PEERS * (messages.MAX_MEMBER_BYTES + 8)
                )
            if kind is not Kind.PEERS:
                raise BadRecord("malformed", f"answer to a greeting is {kind.name}")
            members = [context.learn(sealed, peer_id) for sealed in messages.decode_peers(payload)]
            if any(m.peer_id == peer_id for m in members):
                context.hear(peer_id)
        except Refused as refusal:
            if refusal.reason == "version":
                self._peers.speaks(peer_id, refusal.version)
            log.debug("greeting refused peer=%s reason=%s", peer_id, refusal)
        except OtherVersion as error:
            self._peers.speaks(peer_id, error.version)
            return False
        except BadRecord as error:
            self._peers.strike(peer_id)
            level = (
                logging.DEBUG
                if context.throttle.has((peer_id, "greeting", error.reason))
                else logging.WARNING
            )
            log.log(
                level,
                "greeting answered with a bad record peer=%s reason=%s: %s",
                peer_id,
                error.reason,
                error,
            )
            return False
        except UNREACHABLE as error:
            self._peers.failed(peer_id)
            log.debug("greeting failed peer=%s reason=%s", peer_id, error)
            if speaks_otherwise(error):
                self._note_foreign(peer_id)
            return False
        context.foreign_bootnodes.discard(peer_id)
        await self._membership.meet(peer_id)
        return True


def _by_peer(multiaddrs: Iterable[str]) -> dict[str, list[str]]:
    """Return addresses by peer, from addresses that end in /p2p/PEER; others are left out."""
    contacts: dict[str, list[str]] = {}
    for address, peer_id in map(split_peer, multiaddrs):
        if address and is_peer_id(peer_id):
            contacts.setdefault(peer_id, []).append(address)
    return contacts

"""Sections about the peer-to-peer part."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from worker.settings.value_types import Multiaddr, PeerId, PeerMultiaddr, Port, Section, Weight


class Swarm(Section):
    """The peer-to-peer part: libp2p, the DHT, the exchange of groups."""

    enabled: bool = True
    """Exchange groups with peers. False: train alone."""
    host: str = "0.0.0.0"  # noqa: S104 - a peer-to-peer node listens to its peers
    """Address to listen on."""
    port: Port = 0
    """TCP port of libp2p. 0: the kernel chooses."""
    announce: tuple[Multiaddr, ...] = ()
    """Addresses to announce to peers, such as /ip4/100.64.0.7/tcp/38000. Empty: those that libp2p
    finds."""
    announce_interface: Annotated[str, Field(pattern=r"^[^\s/]{1,15}$")] | None = None
    """Network interface, such as tailscale0 or wg0, whose address at the start is announced with
    `port`. None: none."""
    reachability: Literal["auto", "public", "private"] = "auto"
    """Reachability of this node for peers. private: it is behind a router or firewall, so peers
    reach it through a relay, and directly afterwards if hole punching works. public: never use a
    relay. auto: libp2p finds out with the help of peers, which takes minutes and works only between
    public addresses."""
    relays: tuple[PeerMultiaddr, ...] = ()
    """Relays to use if one is needed. Empty: the bootnodes."""
    relay_others: bool = False
    """Be a relay for other nodes. Requires `reachability: public`."""
    map_port: bool = False
    """Ask the router for an open port (UPnP, NAT-PMP)."""
    bootnodes: tuple[PeerMultiaddr, ...] = ()
    """Peers through which to join the DHT, each with /p2p/ and its peer id, in addition to those on
    the chain and those remembered from earlier runs."""
    startup_timeout_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Time for the libp2p daemon to start, in seconds. Training does not wait for it."""
    peers_per_round: Annotated[int, Field(ge=0, le=64)] = 4
    """k: peers drawn at random in each round to get groups from."""
    draw_families: Weight = 1.0
    """Strength of the preference for peers that have more of our task families. 0: none; 2:
    quadratic."""
    draw_fresh: Weight = 0.5
    """Strength of the preference for peers that contacted us recently. 0: none."""
    draw_useful: Weight = 0.5
    """Strength of the preference for peers whose groups had a signal before. 0: none."""
    max_askers: Annotated[int, Field(gt=0, le=48)] = 32
    """Most peers to serve at the same time. Others are told which peers have our groups, or to ask
    another peer."""
    only_peers: tuple[PeerId, ...] = ()
    """Exchange groups only with these peers (peer ids, as in `status.json`), such as the fleet's
    own. Empty: all peers."""
    only_registered: bool = False
    """Exchange groups only with peers that are registered on the chain."""
    weights: Literal["auto", "on", "off"] = "auto"
    """Exchange weights: serve our newest checkpoint, and take a peer's when we are far behind and
    its weights earn more than ours on held-out tasks. on: with all peers that we exchange groups
    with; auto: only if `only_peers` names them, such as the fleet's own."""
    collect_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Time to wait for the drawn peers' groups once our own are served, in seconds."""
    max_rounds_behind: Annotated[int, Field(ge=0, le=100)] = 2
    """Learn from groups of peers that are at most this many rounds older or newer than our own
    round, so that no node waits for a slow peer."""
    keep_rounds: Annotated[int, Field(gt=0, le=1000)] = 3
    """Number of rounds of which our groups are served to peers."""
    audit_rounds: Annotated[int, Field(gt=0, le=100_000)] = 64
    """Number of rounds of which our signed groups stay on disk, for audits of our rewards (about 12
    KB a round with the tiny model, a few hundred KB with long answers)."""
    announce_every_seconds: Annotated[float, Field(ge=1, le=900)] = 60.0
    """Seconds between two renewals of the membership record in the DHT. It expires after three
    times this."""
    max_groups_per_peer: Annotated[int, Field(gt=0, le=256)] = 64
    """Most groups of a peer in a round."""
    max_completion_bytes: Annotated[int, Field(gt=0, le=500_000)] = 16384
    """Longest completion of a peer, in bytes. Longer ones are refused."""

    @property
    def shares_weights(self) -> bool:
        """Return whether weights are exchanged with the peers that groups are exchanged with."""
        return self.weights == "on" or (self.weights == "auto" and bool(self.only_peers))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.relay_others and self.reachability != "public":
            raise ValueError(
                f"relay_others is set and reachability is {self.reachability}; expected"
                " reachability public, since a relay must be reachable"
            )
        if self.announce_interface is not None and self.port == 0:
            raise ValueError("announce_interface is set and port is 0; expected a port to announce")
        return self


class Bootnode(Section):
    """A DHT peer with a stable identity and address (`hivewright bootnode`)."""

    state_dir: Path = Path("/var/lib/hivewright/bootnode")
    """Folder of its key and of the file `multiaddr`."""
    host: str = "0.0.0.0"  # noqa: S104 - as Swarm.host
    """Address to listen on."""
    port: Port = 38331
    """TCP port of libp2p."""
    announce: tuple[Multiaddr, ...] = ()
    """Addresses to announce to peers. Empty: those that libp2p finds."""
    relay_others: bool = True
    """Be a relay for nodes that peers can't connect to: at most 128 of them, with 16 connections
    each."""

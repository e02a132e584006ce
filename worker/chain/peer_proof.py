"""The message that a node signs with its libp2p key to show a coordinator contract of ours that a
peer id is its own.

The contract checks it (contracts/src/PeerKey.sol). A signature names chain, contract and account,
so it is of no use anywhere else or to anybody else; one that moves a peer is good for one move.
"""

import logging
from dataclasses import dataclass

from worker.chain.client import Call
from worker.chain.contract import NO_ADDRESS, number_of
from worker.chain.coordinator import Coordinator
from worker.chain.deployment import Deployment
from worker.swarm.identity import Identity

log = logging.getLogger(__name__)

_REGISTRATION = b"hivewright/registration/1\n"
_REBINDING = b"hivewright/rebinding/1\n"
_FIRST_VERSION = 2
"""The first version of our contract that checks proofs."""
_PUBLIC_KEY_BYTES = 299
"""libp2p's PublicKey message of an RSA key of 2048 bits: the only kind that the contract checks."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A peer's consent to be held by an account: its public key (libp2p's PublicKey message) and a
    signature.

    `is_move`: made to move a peer that another account holds by a proof, and good for nothing else.
    """

    public_key: bytes
    signature: bytes
    is_move: bool = False


def of_registration(identity: Identity, deployment: Deployment, account: str) -> Proof | None:
    """The proof that `account` registers the peer for whoever has its key; None for keys of another
    size."""
    message = _REGISTRATION + _place(deployment, account)
    return _proof(identity, message, is_move=False)


def of_move(identity: Identity, deployment: Deployment, account: str, moves: int) -> Proof | None:
    """The peer's consent to be moved to `account`, after `moves` moves so far; None for keys of
    another size."""
    message = (
        _REBINDING + _place(deployment, account) + moves.to_bytes(32) + identity.peer_id.encode()
    )
    return _proof(identity, message, is_move=True)


def is_checked(coordinator: Coordinator) -> bool:
    """Return whether the contract knows the calls that carry a proof. A foreign one does not."""
    coordinator.ensure_checked()
    return coordinator.version is not None and number_of(coordinator.version) >= _FIRST_VERSION


def registration(coordinator: Coordinator, peer_id: str, proof: Proof | None) -> Call:
    """The call that registers the peer for the sender: by the proof, if there is one and the
    contract checks it."""
    if proof is None:
        return coordinator.register_peer(peer_id)
    if is_checked(coordinator):
        return call(coordinator, peer_id, proof)
    log.info("contract checks no proofs, plain registration peer_id=%s", peer_id)
    return coordinator.register_peer(peer_id)


def call(coordinator: Coordinator, peer_id: str, proof: Proof) -> Call:
    """The call that shows the proof: it registers the peer for the sender, or moves it to the
    sender."""
    name = "rebindPeer" if proof.is_move else "registerPeerWithProof"
    return coordinator.call(
        f"{name}(string,bytes,bytes)", peer_id, proof.public_key, proof.signature
    )


@dataclass(frozen=True, slots=True)
class Binding:
    """Who holds a peer (None: nobody), whether by a proof, and how often it moved from one account
    to another."""

    account: str | None
    is_proven: bool
    moves: int


def binding(coordinator: Coordinator, peer_id: str) -> Binding:
    """On a contract that checks proofs only."""
    account, is_proven, moves = coordinator.read("getPeerBinding(string)", peer_id)
    return Binding(None if account == NO_ADDRESS else str(account), bool(is_proven), int(moves))


def needed(coordinator: Coordinator, identity: Identity, account: str, move: bool) -> Proof | None:
    """Return what the peer has to show so that `account` becomes its holder, and is by its key.

    None: nothing (it is that already), or nothing helps: a foreign contract, a key of another size,
    or a peer that another account holds by a proof while `move` is not wanted.
    """
    if not is_checked(coordinator):
        log.warning(
            "contract checks no proofs: peer %s is registered without one", identity.peer_id
        )
        return None
    held = binding(coordinator, identity.peer_id)
    if not held.is_proven:
        return of_registration(identity, coordinator.deployment, account)
    if move and held.account != account:
        return of_move(identity, coordinator.deployment, account, held.moves)
    return None


def _place(deployment: Deployment, account: str) -> bytes:
    return (
        deployment.chain_id.to_bytes(32)
        + bytes.fromhex(deployment.contract[2:])
        + bytes.fromhex(account[2:])
    )


def _proof(identity: Identity, message: bytes, is_move: bool) -> Proof | None:
    if len(identity.public_key) != _PUBLIC_KEY_BYTES:
        return None
    return Proof(identity.public_key, identity.sign(message), is_move)

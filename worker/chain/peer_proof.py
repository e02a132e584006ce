"""Proofs of peer ownership: a message signed with the node's libp2p key.

The contract verifies it (contracts/src/PeerKey.sol). The signed message names chain, contract and
account, so the signature is useless for others; one that moves a peer is valid for one move.
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
"""The first version of our contract that verifies proofs."""
_PUBLIC_KEY_BYTES = 299
"""Size of libp2p's PublicKey message for 2048-bit RSA, the only kind the contract verifies."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A peer's consent to belong to an account: its public key and a signature.

    The key is libp2p's PublicKey message. `is_move`: valid only to move a peer that another account
    has by a proof.
    """

    public_key: bytes
    signature: bytes
    is_move: bool = False


def of_registration(
    identity: Identity,
    deployment: Deployment,
    account: str,
) -> Proof | None:
    """Return the proof with which `account` registers the peer; None for keys of another size."""
    message = _REGISTRATION + _place(deployment, account)
    return _proof(identity, message, is_move=False)


def of_move(
    identity: Identity,
    deployment: Deployment,
    account: str,
    moves: int,
) -> Proof | None:
    """Return the peer's consent to move to `account`; `moves` is its number of moves so far.

    None for keys of another size.
    """
    message = message_of_move(identity.peer_id, deployment, account, moves)
    return _proof(identity, message, is_move=True)


def message_of_move(
    peer_id: str,
    deployment: Deployment,
    account: str,
    moves: int,
) -> bytes:
    """Return the message that the peer's key, or its present account, signs for a move."""
    return _REBINDING + _place(deployment, account) + moves.to_bytes(32) + peer_id.encode()


def is_checked(coordinator: Coordinator) -> bool:
    """Return whether the contract verifies proofs; a foreign one does not."""
    coordinator.ensure_checked()
    return coordinator.version is not None and number_of(coordinator.version) >= _FIRST_VERSION


def registration(
    coordinator: Coordinator,
    peer_id: str,
    proof: Proof | None,
) -> Call:
    """Return the call that registers the peer for the sender.

    The proof is included if there is one and the contract verifies it.
    """
    if proof is None:
        return coordinator.register_peer(peer_id)
    if is_checked(coordinator):
        return call(coordinator, peer_id, proof)
    log.info("contract checks no proofs, plain registration peer_id=%s", peer_id)
    return coordinator.register_peer(peer_id)


def call(
    coordinator: Coordinator,
    peer_id: str,
    proof: Proof,
) -> Call:
    """Return the call with the proof, which registers the peer for the sender or moves it there."""
    name = "rebindPeer" if proof.is_move else "registerPeerWithProof"
    return coordinator.call(
        f"{name}(string,bytes,bytes)", peer_id, proof.public_key, proof.signature
    )


@dataclass(frozen=True, slots=True)
class Binding:
    """A peer's account (None: it has none), whether it is proven, and its number of moves."""

    account: str | None
    is_proven: bool
    moves: int


def binding(coordinator: Coordinator, peer_id: str) -> Binding:
    """Return the peer's binding, on a contract that verifies proofs."""
    account, is_proven, moves = coordinator.read("getPeerBinding(string)", peer_id)
    holder = None if account == NO_ADDRESS else str(account)
    return Binding(holder, bool(is_proven), int(moves))


def needed(
    coordinator: Coordinator,
    identity: Identity,
    account: str,
    move: bool,
) -> Proof | None:
    """Return the proof that the peer needs to make `account` its proven owner.

    None: no proof is needed (it is that already), or none helps: a foreign contract, a key of
    another size, or a peer that another account has by a proof while `move` is not set.
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


def _proof(
    identity: Identity,
    message: bytes,
    is_move: bool,
) -> Proof | None:
    if len(identity.public_key) != _PUBLIC_KEY_BYTES:
        return None
    return Proof(identity.public_key, identity.sign(message), is_move)

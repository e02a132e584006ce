"""Prove a node's key to an account service with a signed message, valid once and for one purpose.

The message names the service's chain and contract, the purpose of the request, and a challenge that
the service gave. Services of the previous release have no challenges; their message names only the
peer.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from worker.errors import ChainError

OLD_PREFIX = b"hivewright-enrol/"
"""Beginning of the message for services of the previous release; the peer id follows."""
_PREFIX = b"hivewright/enrolment/2\n"
_MAX_CHALLENGE = 200


@dataclass(frozen=True, slots=True)
class Challenge:
    """A text that an account service wants signed, and the service's chain and contract."""

    text: str
    chain_id: int
    contract: str


def purpose_of_enrolment(token: str) -> str:
    """Return the purpose of a message that is sent with this enrolment token or invitation."""
    return f"enrol\n{token}"


def purpose_of_login(is_move: bool) -> str:
    """Return the purpose of a message that asks for a code to type."""
    return "login, move" if is_move else "login"


def message(
    peer_id: str,
    purpose: str,
    challenge: Challenge | None,
) -> bytes:
    """Return the message that the node's key signs; `challenge` None: the service has none."""
    if challenge is None:
        return OLD_PREFIX + peer_id.encode()
    return (
        _PREFIX
        + challenge.chain_id.to_bytes(32)
        + bytes.fromhex(challenge.contract.removeprefix("0x"))
        + hashlib.sha256(purpose.encode()).digest()
        + hashlib.sha256(challenge.text.encode()).digest()
        + peer_id.encode()
    )


def challenge_in(answer: dict[str, Any], url: str) -> Challenge | None:
    """Return the challenge in a service's description; None: it is of the previous release.

    Raises ChainError for an answer of another form.
    """
    text = answer.get("challenge")
    if text is None:
        return None
    try:
        if not 0 < len(text) <= _MAX_CHALLENGE:
            raise ValueError
        challenge = Challenge(str(text), int(answer["chain_id"]), str(answer["contract"]))
        message("", "", challenge)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ChainError(
            f"{url}: no challenge with chain and contract; expected hivewright's account service"
        ) from None
    return challenge

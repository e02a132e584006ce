"""Verify proofs of nodes' keys: signatures of a challenge that is valid once."""

import hmac
import secrets
import threading
import time

from worker.account.request_bodies import Refused
from worker.chain.coordinator import Coordinator
from worker.chain.enrolment_proof import Challenge, message
from worker.swarm import identity

_SECONDS = 120.0


class KeyProofs:
    """Challenges, and proofs that are made with them. Thread-safe.

    A challenge is valid once, for two minutes, and until the service ends. Nothing is stored about
    a challenge before it is used.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        """Used challenges, and when they expire (Unix time)."""

    def challenge(self) -> str:
        """Return a new challenge: when it expires, a random part, and our HMAC of both."""
        body = f"{int(time.time() + _SECONDS)}.{secrets.token_urlsafe(12)}"
        return f"{body}.{self._mac(body)}"

    def require(
        self,
        peer_id: str,
        public_key: bytes,
        signature: bytes,
        purpose: str,
        challenge: str | None,
    ) -> None:
        """Use the challenge up. Raises Refused unless the peer's key signed it for this purpose.

        `challenge` None: a node of the previous release, whose signature others could replay.
        """
        given = None
        if challenge is not None:
            deployment = self._coordinator.deployment
            given = Challenge(challenge, deployment.chain_id, deployment.contract)
        signed = message(peer_id, purpose, given)
        if not identity.verify(peer_id, public_key, signed, signature):
            raise Refused(403, "SignatureWrong", f"not signed by the key of {peer_id}")
        if challenge is not None:
            self._use(challenge)

    def _use(self, challenge: str) -> None:
        body, _, mac = challenge.rpartition(".")
        is_ours = hmac.compare_digest(self._mac(body).encode(), mac.encode())
        now, expires_at = time.time(), int(body.partition(".")[0]) if is_ours else 0
        with self._lock:
            self._used = {text: at for text, at in self._used.items() if at > now}
            if expires_at <= now or challenge in self._used:
                raise Refused(
                    403,
                    "ChallengeOver",
                    "the signed challenge was used before, is too old, or of another service; ask"
                    " again",
                )
            self._used[challenge] = expires_at

    def _mac(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), "sha256").hexdigest()

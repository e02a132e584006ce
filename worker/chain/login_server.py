"""Client of a login server of RL Swarm (`chain.account_api: rl-swarm`).

That server has no tokens: `orgId` names the account of a person that signed in there. It does
not describe its chain either, so `chain.rpc_url` and `chain.contract` must be set.
"""

import logging
import time
from pathlib import Path

from worker import settings
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.peer_proof import Proof
from worker.errors import ChainUnreachable, ContractRefused, IdentityError
from worker.runtime.files import write_whole
from worker.runtime.state_dir import StateDir

log = logging.getLogger(__name__)

_REGISTER_SECONDS = 60.0
_POLL_SECONDS = 0.5


class LoginServerClient(AccountClient):
    """Like AccountClient; the account's address is the one that the chain had at enrolment."""

    def __init__(self, chain: settings.Chain, state_dir: Path) -> None:
        super().__init__(chain, state_dir)
        self._address_file = StateDir(state_dir).account_address

    def address(self) -> str:
        try:
            return self._address_file.read_text().strip()
        except OSError as error:
            raise IdentityError(
                f"{self._address_file}: {error.strerror}; expected what `hivewright enrol` writes;"
                " run it again"
            ) from None

    def register_peer(self, peer_id: str, proof: Proof | None = None) -> str:
        """Register the peer; RL Swarm's contracts verify no proof."""
        return super().register_peer(peer_id)

    def submit_reward(
        self,
        round: int,
        stage: int,
        reward: int,
        peer_id: str,
        digest: str | None = None,
    ) -> str:
        """Submit a reward; the server knows no digests."""
        return super().submit_reward(round, stage, reward, peer_id)

    def require_active(self) -> None:
        """Raise IdentityError unless a person has signed in to the account at the server."""
        path = f"/api/get-api-key-status?orgId={self._chain.org_id}"
        status = self._text(path).strip().strip('"')
        if status != "activated":
            raise IdentityError(
                f"{self._url}{path}: {status[:40]!r}; expected 'activated': sign in at the server's"
                " page, and put the account's name into chain.org_id"
            )

    def enrol_peer(self, peer_id: str, coordinator: Coordinator) -> str:
        """Register the peer, and return its owner, as soon as the chain has it.

        Raises IdentityError if another account than before has it, or no person has signed in.
        """
        self.require_active()
        try:
            self.register_peer(peer_id)
        except ContractRefused as refusal:
            if refusal.name != "PeerIdAlreadyRegistered":
                raise
        deadline = time.monotonic() + _REGISTER_SECONDS
        while (owner := coordinator.owner_of(peer_id)) is None:
            if time.monotonic() > deadline:
                raise ChainUnreachable(
                    f"registration of {peer_id}: not on the chain within {_REGISTER_SECONDS:g} s;"
                    " run `hivewright enrol` again"
                )
            time.sleep(_POLL_SECONDS)
        if self._address_file.exists() and self.address().lower() != owner.lower():
            raise IdentityError(
                f"peer {peer_id}: registered by {owner}, but enrolled by {self.address()} before;"
                " sign in at the server with the e-mail address of the latter, or use a new key"
            )
        write_whole(self._address_file, f"{owner}\n")
        return owner

    def _headers(self) -> dict[str, str]:
        """Return no headers: the server has no tokens."""
        return {}

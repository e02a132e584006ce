"""Register a node's peer id through its account: own wallet, account service or login server."""

import logging
import time
from contextlib import closing
from pathlib import Path

from worker import settings
from worker.chain import peer_proof
from worker.chain.account_client import Account, AccountClient, OwnEnrolment, require_owner
from worker.chain.coordinator import Coordinator
from worker.chain.login_server import LoginServerClient
from worker.chain.rpc import TokenRefused
from worker.chain.wallet import Wallet
from worker.errors import ChainUnreachable, ContractRefused, IdentityError, SecretError
from worker.swarm.identity import Identity

log = logging.getLogger(__name__)

_REGISTER_SECONDS = 60.0
_POLL_SECONDS = 0.25


def open_account(chain: settings.Chain, state_dir: Path) -> Account:
    """Return the wallet that the settings name, or else the client of their account service.

    Raises IdentityError if the wallet is missing or its password is wrong, ResourceError if another
    process uses it.
    """
    if chain.wallet_dir is not None:
        return Wallet(chain)
    if chain.account_api == "rl-swarm":
        return LoginServerClient(chain, state_dir)
    return AccountClient(chain, state_dir)


def enrol(
    identity: Identity,
    enrolment_token: str | None,
    chain: settings.Chain,
    state_dir: Path,
    move: bool = False,
) -> str:
    """Register the node's peer id and return the account that the peer belongs to.

    With an account service, its token is requested first unless the node has a valid one. Enrolment
    may be repeated at any time. `enrolment_token` None: the node must have its token already.
    `move`: also take the peer from another account that holds it. Raises IdentityError if another
    account registered the peer id or a token is refused, SecretError if the node has neither a
    token of its own nor an enrolment token, ChainUnreachable if service or chain do not answer.
    """
    with closing(open_account(chain, state_dir)) as account:
        coordinator = Coordinator(settings.chain_of_node(chain, state_dir))
        if isinstance(account, OwnEnrolment):
            return account.enrol_peer(identity.peer_id, coordinator)
        try:
            # the account is the one of the node's present token
            ours, is_sent = _register(account, coordinator, identity, move)
        except (IdentityError, SecretError, TokenRefused) as error:
            if enrolment_token is None or not isinstance(account, AccountClient):
                if isinstance(error, SecretError):
                    raise
                raise IdentityError(str(error)) from None
            account.enrol(identity, enrolment_token)
            ours, is_sent = _register(account, coordinator, identity, move)
        return _await_owner(coordinator, identity.peer_id, ours, is_sent)


def _register(
    account: Account,
    coordinator: Coordinator,
    identity: Identity,
    move: bool,
) -> tuple[str, bool]:
    """Return the account's address, and whether a registration was sent.

    If none was, the peer is registered already.
    """
    if isinstance(account, AccountClient):
        account.token()  # fail early if the chain can't be read
    ours = account.address()
    proof = peer_proof.needed(coordinator, identity, ours, move)
    try:
        account.register_peer(identity.peer_id, proof)
    except ContractRefused as refusal:
        if refusal.name != "PeerIdAlreadyRegistered":
            raise
        return ours, False
    return ours, True


def _await_owner(
    coordinator: Coordinator,
    peer_id: str,
    ours: str,
    is_sent: bool,
) -> str:
    """Wait until the chain has an owner for the peer, and verify that it is our account."""
    deadline = time.monotonic() + _REGISTER_SECONDS
    while True:
        owner = _owner_if_told(coordinator, peer_id, deadline)
        # A pending registration may take the peer from a squatter.
        if owner is not None and (not is_sent or owner.lower() == ours.lower()):
            break
        if time.monotonic() > deadline:
            if owner is not None:
                break
            raise ChainUnreachable(
                f"registration of {peer_id}: not on the chain within {_REGISTER_SECONDS:g} s; see"
                " whether the chain makes blocks, then run `hivewright enrol` again"
            )
        time.sleep(_POLL_SECONDS)
    require_owner(peer_id, owner, ours)
    return owner


def _owner_if_told(
    coordinator: Coordinator,
    peer_id: str,
    deadline: float,
) -> str | None:
    """Return the peer's owner; None if it has none, or if the chain does not answer now.

    Raises ChainUnreachable if it does not answer after `deadline` (time.monotonic).
    """
    try:
        return coordinator.owner_of(peer_id)
    except ChainUnreachable as error:
        if time.monotonic() > deadline:
            raise
        log.info("waiting for the registration; the chain does not answer error=%s", error)
        return None

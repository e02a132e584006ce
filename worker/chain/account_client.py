"""The signer and sender of this node: the account service, whose client this is, or a wallet of its
own (wallet.py).

To the service the node shows a token that is good for its own peer id only. The service answers
once the chain has taken the transaction; whether the contract holds it is read from the chain
(chain.settlement), never concluded from an answer.
"""

import base64
import logging
import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

from worker import settings
from worker.chain import deployment, http, peer_proof
from worker.chain.contract import ADVICE
from worker.chain.coordinator import Coordinator
from worker.chain.peer_proof import Proof
from worker.chain.rpc import TokenRefused
from worker.chain.wallet import Wallet
from worker.errors import (
    ChainError,
    ChainUnreachable,
    ContractRefused,
    IdentityError,
    SecretError,
    SettingsError,
    WorkerError,
)
from worker.log import printable
from worker.runtime.files import read_secret, write_whole
from worker.swarm.identity import Identity

log = logging.getLogger(__name__)

TOKEN_FILE = settings.ACCOUNT_TOKEN_FILE
# What a node signs to show that it holds the key of the peer id that it enrols; the peer id
# follows.
ENROL_PREFIX = b"hivewright-enrol/"
# How long enrolment waits for the registration to be on the chain, and how often it looks.
_REGISTER_SECONDS = 60.0
_LOOK_SECONDS = 0.25
# The contract's errors are single capitalised words; anything else in an answer is text for people.
_ERROR_NAME = re.compile(r"[A-Z][A-Za-z0-9]{2,63}")


class Account(Protocol):
    """The signer and sender of a node. Sent is not held: what the contract holds is read from the
    chain.

    Every method may raise ChainUnreachable, ContractRefused and ChainError; the client of the
    account service more.
    """

    def address(self) -> str:
        """The account that it sends from."""

    def register_peer(self, peer_id: str, proof: Proof | None = None) -> str:
        """Bind the peer to the account, by its proof where the contract checks it.

        Returns the transaction's hash, as all that follow.
        """

    def submit_reward(
        self, round: int, stage: int, reward: int, peer_id: str, digest: str | None = None
    ) -> str:
        """`reward` in milli-rewards; `digest` of the signed groups that it is for, hexadecimal."""

    def submit_winner(self, round: int, winners: Sequence[str], peer_id: str) -> str: ...

    def tend(self) -> None:
        """Look after what is on its way; to be called every few seconds."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SwarmInfo:
    """The account service's description of itself: the chain it sends to, and the account it sends
    from."""

    chain_id: int
    contract: str
    org_id: str
    account: str


class AccountClient:
    """The account service at `chain.account_url`, for the node whose token lies in `state_dir` or
    as settings say.

    Every method may raise ChainUnreachable (no answer, or the service has no chain),
    ContractRefused (without a name if the service gives none), IdentityError (the token is missing
    or not good for this peer), SettingsError (the service knows no such account) and ChainError.
    """

    def __init__(self, chain: settings.Chain, state_dir: Path) -> None:
        if chain.account_url is None:
            raise SettingsError(
                "chain.account_url: not set; expected the address of the account service"
            )
        self._chain = chain
        self._url = chain.account_url.rstrip("/")
        self.token_file = chain.account_token_file or state_dir / TOKEN_FILE
        self._session = http.open_session()
        self.clock_offset: float | None = None
        """Seconds that our clock was ahead of the service's at its last answer, to a second; None:
        not known."""

    def swarm(self) -> SwarmInfo:
        answer = self._request("GET", "/api/swarm")
        try:
            return SwarmInfo(
                *(answer[name] for name in ("chain_id", "contract", "org_id", "account"))
            )
        except KeyError as error:
            raise ChainError(
                f"{self._url}/api/swarm: no {error}; expected hivewright's account service"
            ) from None

    def address(self) -> str:
        return str(self.swarm().account)

    def enrol(self, identity: Identity, enrolment_token: str) -> None:
        """Get this node's token and keep it in `token_file`."""
        body = {
            "peerId": identity.peer_id,
            "publicKey": base64.b64encode(identity.public_key).decode(),
            "signature": (
                base64.b64encode(identity.sign(ENROL_PREFIX + identity.peer_id.encode())).decode()
            ),
            "token": enrolment_token,
        }
        token = self._request("POST", "/api/enrol", body).get("token")
        if (
            not isinstance(token, str)
            or not token.isascii()
            or not token.isprintable()
            or not 0 < len(token) < 1024
        ):
            raise ChainError(
                f"{self._url}/api/enrol: no token in the answer; expected hivewright's account"
                " service"
            )
        write_whole(self.token_file, token + "\n", mode=0o600)

    def register_peer(self, peer_id: str, proof: Proof | None = None) -> str:
        body: dict[str, Any] = {"peerId": peer_id}
        if proof is not None:
            public_key, signature = (
                base64.b64encode(part).decode() for part in (proof.public_key, proof.signature)
            )
            body["proof"] = {
                "publicKey": public_key,
                "signature": signature,
                "isMove": proof.is_move,
            }
        return self._send("/api/register-peer", body)

    def submit_reward(
        self, round: int, stage: int, reward: int, peer_id: str, digest: str | None = None
    ) -> str:
        body = {"roundNumber": round, "stageNumber": stage, "reward": reward, "peerId": peer_id}
        return self._send(
            "/api/submit-reward", body if digest is None else {**body, "groupsDigest": digest}
        )

    def submit_winner(self, round: int, winners: Sequence[str], peer_id: str) -> str:
        return self._send(
            "/api/submit-winner",
            {"roundNumber": round, "winners": list(winners), "peerId": peer_id},
        )

    def tend(self) -> None:
        """The service looks after its transactions itself."""

    def close(self) -> None:
        self._session.close()

    def _send(self, path: str, body: dict[str, Any]) -> str:
        headers = {"Authorization": f"Bearer {self.token()}"}
        tx_hash = self._request("POST", path, {"orgId": self._chain.org_id, **body}, headers).get(
            "hash"
        )
        if not isinstance(tx_hash, str) or not re.fullmatch(r"0x[0-9a-fA-F]{64}", tx_hash):
            raise ChainError(
                f"{self._url}{path}: hash is {_shown(tx_hash)}; expected a transaction hash"
            )
        return tx_hash

    def token(self) -> str:
        """The node's token, as its file has it now."""
        expected = (
            "this node's token for the account service; run `hivewright enrol` with"
            " chain.enrolment_token_file set"
        )
        return read_secret(self.token_file, expected, "chain.account_token_file")

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        url = self._url + path
        with deployment.translated(f"{url} (chain.account_url)", self._chain.timeout_seconds):
            answer = self._session.request(
                method,
                url,
                json=body,
                headers=headers,
                timeout=self._chain.timeout_seconds,
                allow_redirects=False,
            )
        self._compare_clocks(answer.headers.get("Date"))
        try:
            content = answer.json()
        except (ValueError, RecursionError):  # the latter: nested without end
            content = None
        if answer.status_code != 200:
            raise self._failure(url, answer.status_code, content)
        if not isinstance(content, dict):
            raise ChainError(
                f"{url}: the answer is not a JSON object; check that chain.account_url is an"
                " account service"
            )
        return content

    def _compare_clocks(self, date: str | None) -> None:
        try:
            theirs = parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return
        self.clock_offset = time.time() - theirs - 0.5  # an HTTP date is cut to whole seconds

    def _failure(self, url: str, status: int, content: Any) -> WorkerError:
        error = content.get("error") if isinstance(content, dict) else None
        detail = content.get("detail") if isinstance(content, dict) else None
        said = f"{url}: HTTP {status}: {_shown(error)}" + (f": {_shown(detail)}" if detail else "")
        if status in (401, 403):
            if error == "EnrolmentTokenWrong":
                return IdentityError(
                    f"{said}; put that one into the file of chain.enrolment_token_file"
                )
            return IdentityError(
                f"{said}; run `hivewright enrol` with the enrolment token that the service was"
                " given"
            )
        if status == 400 and isinstance(error, str) and _ERROR_NAME.fullmatch(error):
            return ContractRefused(error, f"{said}; {ADVICE.get(error, 'the contract refused')}")
        if status == 400:
            return ContractRefused(
                "", f"{said}; check that node and account service are of one version"
            )
        if status == 404:
            return SettingsError(
                f"{said}; check chain.account_url and chain.org_id ({self._chain.org_id})"
            )
        if status == 429 or status >= 500:
            return ChainUnreachable(f"{said}; see the account service's log")
        return ChainError(f"{said}; check that chain.account_url is an account service")


def open_account(chain: settings.Chain, state_dir: Path) -> Account:
    """The wallet that the settings name, or else the client of their account service.

    Raises IdentityError if the wallet is missing or its password wrong, ResourceError if another
    process uses it.
    """
    return AccountClient(chain, state_dir) if chain.wallet_dir is None else Wallet(chain)


def enrol(
    identity: Identity,
    enrolment_token: str | None,
    chain: settings.Chain,
    state_dir: Path,
    move: bool = False,
) -> str:
    """Register the node's peer id; with an account service get its token first, unless it has a
    good one.

    Returns the account that the peer belongs to. May be run again at any time. `enrolment_token`
    None: the node must have its token already. `move`: also from another account that holds the
    peer. Raises IdentityError if the peer id is registered by another account or a token is
    refused, SecretError if a node without a token of its own has no enrolment token either,
    ChainUnreachable if service or chain do not answer.
    """
    with closing(open_account(chain, state_dir)) as account:
        coordinator, ours = Coordinator(settings.chain_of_node(chain, state_dir)), account.address()

        def register() -> bool:
            if isinstance(account, AccountClient):
                account.token()  # the chain is read with it
            return _register(
                account, identity.peer_id, peer_proof.needed(coordinator, identity, ours, move)
            )

        try:
            is_sent = register()  # with the token from before
        except (IdentityError, SecretError, TokenRefused) as error:
            if enrolment_token is None or not isinstance(account, AccountClient):
                raise (
                    error if isinstance(error, SecretError) else IdentityError(str(error))
                ) from None
            account.enrol(identity, enrolment_token)
            is_sent = register()
        return _await_owner(coordinator, identity.peer_id, ours, is_sent)


def _register(account: Account, peer_id: str, shown: Proof | None) -> bool:
    """Return whether a registration is on its way; if not, somebody has registered the peer."""
    try:
        account.register_peer(peer_id, shown)
    except ContractRefused as refusal:
        if refusal.name != "PeerIdAlreadyRegistered":
            raise
        return False
    return True


def _await_owner(coordinator: Coordinator, peer_id: str, ours: str, is_sent: bool) -> str:
    """Wait until the chain says whose the peer is, and make sure that it is our account's."""
    deadline = time.monotonic() + _REGISTER_SECONDS
    # What is on its way may take the peer from a squatter.
    while (owner := _owner_if_told(coordinator, peer_id, deadline)) is None or (
        is_sent and owner.lower() != ours.lower()
    ):
        if time.monotonic() > deadline:
            if owner is not None:
                break
            raise ChainUnreachable(
                f"registration of {peer_id}: not on the chain within {_REGISTER_SECONDS:g} s; see"
                " whether the chain makes blocks, then run `hivewright enrol` again"
            )
        time.sleep(_LOOK_SECONDS)
    require_owner(peer_id, owner, ours)
    return owner


def _owner_if_told(coordinator: Coordinator, peer_id: str, deadline: float) -> str | None:
    """The peer's owner; None also where the chain does not answer just now, up to `deadline`
    (time.monotonic)."""
    try:
        return coordinator.owner_of(peer_id)
    except ChainUnreachable as error:
        if time.monotonic() > deadline:
            raise
        log.info("registration is waited for, the chain does not answer error=%s", error)
        return None


def server_time(url: str, timeout_seconds: float) -> tuple[str, float]:
    """The time that the account service says (an HTTP date), and ours in the middle of the asking.
    ChainUnreachable."""
    began = time.time()
    with (
        deployment.translated(f"{url} (chain.account_url)", timeout_seconds),
        http.open_session() as session,
    ):
        answer = session.head(
            f"{url.rstrip('/')}/api/swarm", timeout=timeout_seconds, allow_redirects=False
        )
    if "Date" not in answer.headers:
        raise ChainError(f"{url}: says no date; expected hivewright's account service")
    return answer.headers["Date"], (began + time.time()) / 2


def require_owner(peer_id: str, owner: str, ours: str) -> None:
    """Raise IdentityError unless `owner`, as the chain has it, is `ours`, the account that sends
    for us."""
    if owner.lower() != ours.lower():
        raise IdentityError(
            f"peer {peer_id}: registered by {owner}, but this node's account is {ours}; use the"
            " account that registered it, move the peer (`hivewright enrol --move`), or enrol with"
            " a new key"
        )


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value))[:200]

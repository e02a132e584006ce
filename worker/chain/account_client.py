"""Client of the account service, and the interface that it shares with a node's own wallet.

A node authenticates to the service with a token that is valid only for its own peer id. The service
answers when the chain has accepted the transaction. Whether the contract recorded it is never
concluded from that answer, but read from the chain (chain.settlement). The wallet is in wallet.py.
"""

import base64
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from worker import settings
from worker.chain import deployment, http
from worker.chain.contract import ADVICE
from worker.chain.coordinator import Coordinator
from worker.chain.enrolment_proof import (
    Challenge,
    challenge_in,
    message,
    purpose_of_enrolment,
)
from worker.chain.market import Market
from worker.chain.peer_proof import Proof
from worker.errors import (
    ChainError,
    ChainUnreachable,
    ContractRefused,
    IdentityError,
    SettingsError,
    WorkerError,
)
from worker.log import printable
from worker.runtime.files import read_secret, write_whole
from worker.runtime.state_dir import StateDir
from worker.swarm.identity import Identity

log = logging.getLogger(__name__)

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_ERROR_NAME = re.compile(r"[A-Z][A-Za-z0-9]{2,63}")
"""Pattern of the names of the contract's errors; other errors in an answer are plain text."""
_EXPLAINED = ("PeerOfAnotherAccount", "TooManyNodes", "AccountSuspended", "InvitationInvalid")
"""Refusals of the account service whose text contains the advice."""
_MAX_EXPLANATION = 500


class Account(Protocol):
    """The signer and sender of a node's transactions.

    A transaction that was sent need not be recorded: read the contract's state from the chain.

    Every method may raise ChainUnreachable, ContractRefused and ChainError; the client of the
    account service raises more (AccountClient).
    """

    def address(self) -> str:
        """Return the account that transactions are sent from."""

    def register_peer(
        self,
        peer_id: str,
        proof: Proof | None = None,
    ) -> str:
        """Bind the peer to the account, with its proof where the contract verifies it.

        Returns the transaction's hash, as do the other methods that send.
        """

    def submit_reward(
        self,
        round: int,
        stage: int,
        reward: int,
        peer_id: str,
        digest: str | None = None,
    ) -> str:
        """Submit a reward in milli-rewards.

        `digest` is that of the signed groups that earned it, hexadecimal; None: there is none.
        """

    def submit_winner(
        self,
        round: int,
        winners: Sequence[str],
        peer_id: str,
    ) -> str: ...

    def guess_answer(
        self, market: Market, game: int, peer_id: str, round: int, choice: int, bet: int
    ) -> str:
        """Bet `bet` units of a token in a round of a game."""

    def claim_reward(
        self,
        market: Market,
        game: int,
        peer_id: str,
    ) -> str:
        """Claim what a game pays to the peer."""

    def tend(self) -> None:
        """Resend transactions that are stuck. Must be called every few seconds."""

    def close(self) -> None: ...


@runtime_checkable
class OwnEnrolment(Protocol):
    """An account with its own way of enrolling a node."""

    def enrol_peer(
        self,
        peer_id: str,
        coordinator: Coordinator,
    ) -> str:
        """Register the peer, and return its owner on the chain."""


@dataclass(frozen=True, slots=True)
class SwarmInfo:
    """The account service's description of itself: its chain, and the account it sends from.

    `market`, `judge_url`: the swarm's prediction market; None: it has none.
    """

    chain_id: int
    contract: str
    org_id: str
    account: str
    market: str | None = None
    judge_url: str | None = None


class AccountClient:
    """Client of the account service at `chain.account_url`.

    The node's token is in `chain.account_token_file`; if that is not set, in `state_dir`.

    Every method may raise ChainUnreachable (no answer, or the service has no chain),
    ContractRefused (with an empty name if the service gives none), IdentityError (the token is
    missing or not valid for this peer), SettingsError (the service does not know the account) and
    ChainError.
    """

    def __init__(
        self,
        chain: settings.Chain,
        state_dir: Path,
    ) -> None:
        if chain.account_url is None:
            raise SettingsError(
                "chain.account_url: not set; expected the address of the account service"
            )
        self._chain = chain
        self._url = chain.account_url.rstrip("/")
        self.token_file = chain.account_token_file or StateDir(state_dir).account_token
        self._session = http.open_session()
        self._org_id = chain.org_id
        self.clock_offset: float | None = None
        """Seconds by which our clock was ahead at the last answer, to the second; None: unknown."""

    def swarm(self) -> SwarmInfo:
        """Return the service's description of its chain and of this node's account."""
        headers = {}
        if self.token_file.exists():
            headers["Authorization"] = f"Bearer {self.token()}"
        answer = self._request("GET", "/api/swarm", headers=headers)
        source = f"{self._url}/api/swarm"
        try:
            self._org_id = self._chain.org_id or answer["org_id"]
            return SwarmInfo(
                chain_id=answer["chain_id"],
                contract=answer["contract"],
                org_id=answer["org_id"],
                account=answer["account"],
                market=deployment.address_in(answer, "market", source),
                judge_url=_url_in(answer, "judge_url", source),
            )
        except KeyError as error:
            raise ChainError(
                f"{source}: no {error}; expected hivewright's account service"
            ) from None

    def address(self) -> str:
        return str(self.swarm().account)

    def challenge(self) -> Challenge | None:
        """Return a challenge for a proof of the node's key; None: the service has none."""
        return challenge_in(self._request("GET", "/api/swarm"), f"{self._url}/api/swarm")

    def enrol(
        self,
        identity: Identity,
        enrolment_token: str,
    ) -> None:
        """Request this node's token and write it to `token_file`."""
        challenge = self.challenge()
        purpose = purpose_of_enrolment(enrolment_token)
        signature = identity.sign(message(identity.peer_id, purpose, challenge))
        body = {
            "peerId": identity.peer_id,
            "publicKey": base64.b64encode(identity.public_key).decode(),
            "signature": base64.b64encode(signature).decode(),
            "token": enrolment_token,
        }
        if challenge is not None:
            body["challenge"] = challenge.text
        token = self._request("POST", "/api/enrol", body).get("token")
        if not _is_token(token):
            raise ChainError(
                f"{self._url}/api/enrol: no token in the answer; expected hivewright's account"
                " service"
            )
        self.keep_token(str(token))

    def keep_token(self, token: str) -> None:
        """Write the node's token to its file; it may belong to another account than before."""
        write_whole(self.token_file, f"{token}\n", mode=0o600)
        self._org_id = self._chain.org_id

    def register_peer(
        self,
        peer_id: str,
        proof: Proof | None = None,
    ) -> str:
        body: dict[str, Any] = {"peerId": peer_id}
        if proof is not None:
            body["proof"] = {
                "publicKey": base64.b64encode(proof.public_key).decode(),
                "signature": base64.b64encode(proof.signature).decode(),
                "isMove": proof.is_move,
            }
        return self._send("/api/register-peer", body)

    def submit_reward(
        self,
        round: int,
        stage: int,
        reward: int,
        peer_id: str,
        digest: str | None = None,
    ) -> str:
        body = {"roundNumber": round, "stageNumber": stage, "reward": reward, "peerId": peer_id}
        if digest is not None:
            body["groupsDigest"] = digest
        return self._send("/api/submit-reward", body)

    def submit_winner(
        self,
        round: int,
        winners: Sequence[str],
        peer_id: str,
    ) -> str:
        body = {"roundNumber": round, "winners": list(winners), "peerId": peer_id}
        return self._send("/api/submit-winner", body)

    def guess_answer(
        self, market: Market, game: int, peer_id: str, round: int, choice: int, bet: int
    ) -> str:
        body = {"gameId": game, "peerId": peer_id, "clueId": round, "choiceIdx": choice, "bet": bet}
        return self._send("/api/guess-answer", body)

    def claim_reward(
        self,
        market: Market,
        game: int,
        peer_id: str,
    ) -> str:
        return self._send("/api/claim-reward", {"gameId": game, "peerId": peer_id})

    def tend(self) -> None:
        """Do nothing: the service tends its transactions itself."""

    def close(self) -> None:
        self._session.close()

    def _send(
        self,
        path: str,
        body: dict[str, Any],
    ) -> str:
        headers = self._headers()
        if self._org_id is None:
            self.swarm()
        answer = self._request("POST", path, {"orgId": self._org_id, **body}, headers)
        tx_hash = answer.get("hash")
        if not isinstance(tx_hash, str) or not re.fullmatch(r"0x[0-9a-fA-F]{64}", tx_hash):
            raise ChainError(
                f"{self._url}{path}: hash is {_shown(tx_hash)}; expected a transaction hash"
            )
        return tx_hash

    def _headers(self) -> dict[str, str]:
        """Return the headers that identify this node to the service."""
        return {"Authorization": f"Bearer {self.token()}"}

    def token(self) -> str:
        """Return the node's token as it is in its file now."""
        expected = (
            "this node's token for the account service; run `hivewright enrol` with"
            " chain.enrolment_token_file set"
        )
        return read_secret(self.token_file, expected, "chain.account_token_file")

    def _text(self, path: str) -> str:
        """Return the text that a GET answers."""
        with deployment.translated(f"{self._url} (chain.account_url)", self._chain.timeout_seconds):
            answer = self._session.get(
                self._url + path, timeout=self._chain.timeout_seconds, allow_redirects=False
            )
        if answer.status_code != 200:
            raise self._failure(self._url + path, answer.status_code, None)
        return answer.text

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
        except (ValueError, RecursionError):  # RecursionError: too deeply nested JSON
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

    def _failure(
        self,
        url: str,
        status: int,
        content: Any,
    ) -> WorkerError:
        answer = content if isinstance(content, dict) else {}
        error, detail = answer.get("error"), answer.get("detail")
        said = f"{url}: HTTP {status}: {_shown(error)}"
        if detail:
            said += f": {_shown(detail)}"
        if error == "EnrolmentTokenWrong":
            return IdentityError(f"{said}; put that token into chain.enrolment_token_file")
        if error in _EXPLAINED:
            return IdentityError(f"{url}: {error}: {printable(str(detail))[:_MAX_EXPLANATION]}")
        if status in (401, 403):
            return IdentityError(
                f"{said}; run `hivewright enrol` with the account service's enrolment token"
            )
        if status == 400:
            return _contract_refusal(error, said)
        if status == 404:
            return SettingsError(
                f"{said}; check chain.account_url and chain.org_id ({self._org_id})"
            )
        if status == 429 or status >= 500:
            return ChainUnreachable(f"{said}; see the account service's log")
        return ChainError(f"{said}; check that chain.account_url is an account service")


def _url_in(answer: dict[str, Any], key: str, source: str) -> str | None:
    """Return the URL under `key`; None if it is missing or null, as in earlier versions' services.

    Raises ChainError, which names `source`, if it is not a URL.
    """
    value = answer.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"https?://\S{1,500}", value):
        raise ChainError(f"{source}: {key}: got {value!r:.80}; expected an http or https URL")
    return value


def _is_token(value: object) -> bool:
    if not isinstance(value, str) or not 0 < len(value) < 1024:
        return False
    return value.isascii() and value.isprintable()


def _contract_refusal(error: object, said: str) -> ContractRefused:
    if isinstance(error, str) and _ERROR_NAME.fullmatch(error):
        advice = ADVICE.get(error, "the contract refused")
        return ContractRefused(error, f"{said}; {advice}")
    return ContractRefused("", f"{said}; check that node and account service are of one version")


def server_time(
    url: str,
    timeout_seconds: float,
) -> tuple[str, float]:
    """Return the account service's time (an HTTP date), and our time at the middle of the request.

    Raises ChainUnreachable if the service does not answer.
    """
    swarm_url = f"{url.rstrip('/')}/api/swarm"
    began = time.time()
    with (
        deployment.translated(f"{url} (chain.account_url)", timeout_seconds),
        http.open_session() as session,
    ):
        answer = session.head(swarm_url, timeout=timeout_seconds, allow_redirects=False)
    if "Date" not in answer.headers:
        raise ChainError(
            f"{url}: no Date header in the answer; expected hivewright's account service"
        )
    return answer.headers["Date"], (began + time.time()) / 2


def require_owner(
    peer_id: str,
    owner: str,
    ours: str,
) -> None:
    """Raise IdentityError unless the peer's owner on the chain is `ours`, the account we use."""
    if owner.lower() != ours.lower():
        raise IdentityError(
            f"peer {peer_id}: registered by {owner}, but this node's account is {ours}; use the"
            " account that registered it, move the peer (`hivewright enrol --move`), or enrol with"
            " a new key"
        )


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value))[:200]

"""JSON-RPC over one address of a chain or several: one serves until it fails, then the next.

An address is used only while it answers with the expected chain id, which is asked for again after
every failure and once a minute. Whatever is asked may be asked twice: reads change nothing, and a
signed transaction that arrives a second time is the same transaction.
"""

import itertools
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

import requests
from web3.providers import JSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from worker.chain import http
from worker.errors import BadAnswer, ChainError, ChainUnreachable, SecretError
from worker.log import printable
from worker.runtime.files import read_secret

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_LEAST_TRIES = 2
_VOUCHED_SECONDS = 60.0
_PAUSE_SECONDS = 0.05
"""Before the only address is tried again: a node that restarts closes connections for a moment."""


_MOST_REST_SECONDS = 60.0
"""A Retry-After of more than this is cut: a broken proxy must not silence a role for a day."""
_LEAST_REST_SECONDS = 1.0
"""Time that an address rests that throttles without saying how long."""


_MOST_TOGETHER = 20
"""What the account service takes as one batch (gate.MAX_BATCH)."""


class WrongChain(ChainError):
    """The address answers with another chain id."""


class Throttled(ChainUnreachable):
    """The address asks for fewer requests; it is not asked again for `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class TooMuch(BadAnswer):
    """The request or its answer is too large for the address: to be asked in smaller pieces."""


class TokenRefused(ChainUnreachable):
    """The address answers nobody without a token, or does not take ours."""


class Rpc(JSONBaseProvider):
    """A web3 provider for `urls`, which are of one chain. `key` names the setting that they come
    from.

    A request ends within about `timeout_seconds`, all tries included. `chain_id` None: not checked.
    Requests raise ChainUnreachable if no address answers, BadAnswer if one answers with no use,
    WrongChain if those that do are of another chain. An address that throttles (HTTP 429) rests for
    as long as it asks. Any number of threads may use it. `token_file`: its content goes with every
    request; it is read each time, and may be missing.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str,
        chain_id: int | None,
        timeout_seconds: float,
        token_file: Path | None = None,
    ) -> None:
        super().__init__()
        self._token_file = token_file
        # Other clients of a proxy that mixes up answers must not count as we do.
        self.request_counter = itertools.count(secrets.randbits(48))
        self._urls = tuple(urls)
        self._key = key
        self._chain_id = chain_id
        self._tries = max(_LEAST_TRIES, len(self._urls))
        self._timeout = timeout_seconds
        self._patience = timeout_seconds / self._tries
        self._lock = threading.Lock()
        self._current = self._urls[0]
        self._vouched_until: dict[str, float] = {}
        self._wrong: dict[str, int] = {}
        self._rests_until: dict[str, float] = {}
        """When an address that throttled may be asked again."""
        self._one_by_one: set[str] = set()
        """Addresses that do not take several requests at once."""
        self._sessions = threading.local()

    @property
    def source(self) -> str:
        """The addresses and their setting, for messages."""
        return f"{', '.join(self._urls)} ({self._key})" if self._key else ", ".join(self._urls)

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        if method == "eth_chainId" and self._chain_id is not None:
            # web3 asks before every call; the address in use has answered within the last minute.
            self.choose()
            return RPCResponse(jsonrpc="2.0", id=0, result=hex(self._chain_id))

        def ask(url: str) -> RPCResponse:
            answer = self._ask(url, method, params)
            self._require_use(url, method, answer)
            return answer

        return self._first(ask)

    def ask_all(self, method: str, many: Sequence[Sequence[object]]) -> list[str | None]:
        """The hexadecimal answers to the same method with each of these parameters, which go out as
        one request.

        None where there is none: refused, mixed up, the address is away or does not take several
        requests at once. Such a one is to be asked alone, by `make_request`, which tries the other
        addresses and says what is wrong.
        """
        if len(many) < 2:
            return [None] * len(many)
        if self._token_file is not None and len(many) > _MOST_TOGETHER:
            head, rest = many[:_MOST_TOGETHER], many[_MOST_TOGETHER:]
            return [*self.ask_all(method, head), *self.ask_all(method, rest)]
        asked = {next(self.request_counter): params for params in many}
        body = [
            {"jsonrpc": "2.0", "method": method, "params": params, "id": id}
            for id, params in asked.items()
        ]
        for url in self._turns():
            if url in self._one_by_one:
                continue
            try:
                with self._using(url):
                    answers = self._post(url, json.dumps(body).encode())
            except ChainError as error:
                log.debug(
                    "not answered together method=%s count=%d error=%s", method, len(many), error
                )
                continue
            if isinstance(answers, list):
                found = {
                    answer.get("id"): answer.get("result")
                    for answer in answers
                    if isinstance(answer, dict)
                }
                return [
                    result if _is_hexadecimal(result := found.get(id)) else None for id in asked
                ]
            self._one_by_one.add(url)
        return [None] * len(many)

    def is_connected(self, show_traceback: bool = False) -> bool:
        try:
            self.make_request(RPCEndpoint("web3_clientVersion"), [])
        except ChainError:
            return False
        return True

    def survey(self) -> None:
        """Ask every address for its chain id now, and log what is wrong with any. Raises if none
        can be used."""
        self._vouched_until.clear()
        if len(self._urls) == 1:
            self.choose()
            return
        errors = []
        for url in self._urls:
            try:
                with self._using(url, switch=False):
                    pass
            except ChainError as error:
                errors.append(error)
                log.warning("rpc address not used now: %s", error)
        if len(errors) == len(self._urls):
            raise _combined(errors)

    def choose(self) -> str:
        """The address for a request of somebody else, who calls `failed` if it comes to nothing
        there."""
        return self._first(lambda url: url)

    def failed(self, url: str) -> None:
        """The address gave no answer: the next one is to be tried."""
        self._vouched_until.pop(url, None)
        with self._lock:
            if url == self._current:
                self._current = self._urls[(self._urls.index(url) + 1) % len(self._urls)]

    def throttled(self, url: str, headers: Mapping[str, str]) -> Throttled:
        """The error for an HTTP 429 that somebody else got from the address, which rests from now
        on."""
        return self._rest(url, "HTTP 429", retry_after(headers))

    @property
    def num_addresses(self) -> int:
        return len(self._urls)

    # ----

    def _turns(self) -> list[str]:
        """Return whom to ask, one after the other: the one that served last first, those of another
        chain last."""
        others = [url for url in self._urls if url != self._current]
        order = sorted([self._current, *others], key=lambda url: url in self._wrong)
        return (order * _LEAST_TRIES)[: self._tries]

    def _first(self, use: Callable[[str], _Result]) -> _Result:
        """Return what `use` gives for the first address that can be used; an address may have
        several turns.

        One that throttled and also gave an answer of no use has one turn more: the throttling was
        no failed try.
        """
        errors: dict[str, ChainError] = {}
        deadline = time.monotonic() + self._timeout
        turns, has_more = self._turns(), False
        while turns:
            url = turns.pop(0)
            if url in errors:
                self._pause(url, deadline)
            try:
                with self._using(url):
                    return use(url)
            except ChainError as error:
                earlier = errors.get(url)
                errors[url] = error
                if (
                    not turns
                    and not has_more
                    and earlier
                    and _is_throttled(earlier) != _is_throttled(error)
                ):
                    has_more = True
                    turns.append(url)
        raise _combined(list(errors.values()))

    def _pause(self, url: str, deadline: float) -> None:
        """Before an address is tried a second time: as long as it wants to rest, if there is time
        for that."""
        rest = self._rests_until.get(url, 0.0) - time.monotonic()
        if time.monotonic() + rest < deadline:
            time.sleep(max(rest, _PAUSE_SECONDS))

    def _require_rested(self, url: str) -> None:
        rest = self._rests_until.get(url, 0.0) - time.monotonic()
        if rest > 0:
            raise Throttled(
                f"{self._place(url)}: throttles; it is asked again in {rest:.0f} s", rest
            )

    def _rest(self, url: str, said: str, seconds: float | None) -> Throttled:
        rest = min(
            _MOST_REST_SECONDS, _LEAST_REST_SECONDS if seconds is None else max(0.0, seconds)
        )
        self._rests_until[url] = time.monotonic() + rest
        advice = "ask less often (chain.poll_seconds), or add addresses to chain.rpc_url"
        return Throttled(
            f"{self._place(url)}: throttles ({said}), wants {rest:g} s; {advice}", rest
        )

    def _require_use(self, url: str, method: str, answer: RPCResponse) -> None:
        """Raise if the answer is an error of this node's own, which another node may not have."""
        error = answer.get("error")
        if not error:
            return
        code = error.get("code") if isinstance(error, dict) else None
        text = str(error.get("message") if isinstance(error, dict) else error)
        if _is_throttling(code, text):
            raise self._rest(url, printable(text)[:100], _named_seconds(error))
        is_telling = method in _TELLING and isinstance(error, dict)
        if not is_telling or (_NODE_TROUBLE.search(text) and not is_revert(text)):
            raise BadAnswer(
                f"{self._place(url)}: {method}: {printable(text)[:200]}; check that this node is in"
                " sync"
            )

    @contextmanager
    def _using(self, url: str, switch: bool = True) -> Iterator[None]:
        """Note what using the address comes to. It must be of the right chain before anything else
        is asked."""
        try:
            self._require_rested(url)
            self._vouch(url)
            yield
        except ChainError:
            self._vouched_until.pop(url, None)
            raise
        with self._lock:
            if switch and url != self._current:
                log.warning("rpc address changed from=%s to=%s", self._current, url)
                self._current = url

    def _vouch(self, url: str) -> None:
        if self._chain_id is None or self._vouched_until.get(url, 0.0) > time.monotonic():
            return
        answer = self._ask(url, RPCEndpoint("eth_chainId"), [])
        if "result" not in answer:
            self._require_use(url, "eth_chainId", answer)
        try:
            found = int(answer["result"], 16)
        except (KeyError, ValueError):  # an error that is null, "0x" alone
            raise BadAnswer(
                f"{self._place(url)}: eth_chainId is answered with no number; {CHECK_ADDRESS}"
            ) from None
        if found != self._chain_id:
            self._wrong[url] = found
            raise WrongChain(
                f"chain id {found} answered by {self._place(url)}, expected {self._chain_id}"
                " (chain.id); point one of them at the other"
            )
        self._wrong.pop(url, None)
        self._vouched_until[url] = time.monotonic() + _VOUCHED_SECONDS

    def _ask(self, url: str, method: RPCEndpoint, params: Any) -> RPCResponse:
        body = self.encode_rpc_request(method, params)
        decoded = self._post(url, body)
        if not isinstance(decoded, dict) or not ("result" in decoded or "error" in decoded):
            raise BadAnswer(f"{self._place(url)}: the answer is not JSON-RPC; {CHECK_ADDRESS}")
        if decoded.get("error") is None and "result" in decoded:
            decoded.pop("error", None)
        if (
            method in _HEXADECIMAL
            and "error" not in decoded
            and not _is_hexadecimal(decoded["result"])
        ):
            raise BadAnswer(
                f"{self._place(url)}: {method} is answered with no hexadecimal number;"
                f" {CHECK_ADDRESS}"
            )
        if (
            method == "eth_getLogs"
            and "error" not in decoded
            and not isinstance(decoded["result"], list)
        ):
            raise BadAnswer(
                f"{self._place(url)}: {method} is answered with no list; {CHECK_ADDRESS}"
            )
        # An answer to another request: a proxy has mixed them up. Without an id it is about a
        # request not understood.
        if decoded.get("id") is not None and decoded["id"] != json.loads(body)["id"]:
            raise ChainUnreachable(
                f"{self._place(url)}: the answer is to another request; check what is in between"
            )
        return cast(RPCResponse, decoded)

    def _post(self, url: str, body: bytes) -> Any:
        with translated(self._place(url), self._timeout / len(self._urls)):
            answer = self._session.post(
                url, data=body, timeout=self._patience, headers=self._headers()
            )
            if answer.status_code == 429 or (
                answer.status_code == 503 and "Retry-After" in answer.headers
            ):
                raise self._rest(url, f"HTTP {answer.status_code}", retry_after(answer.headers))
            if not 400 <= answer.status_code < 500:
                answer.raise_for_status()
                return self.decode_rpc_response(answer.content)
            return self._decode_refusal(url, answer)

    def _decode_refusal(self, url: str, answer: requests.Response) -> Any:
        """The JSON-RPC error in an answer with a status of 400 to 499, which some nodes give those
        errors."""
        try:
            decoded = self.decode_rpc_response(answer.content)
        except (ValueError, RecursionError):
            decoded = None
        if isinstance(decoded, dict) and "error" in decoded and "id" in decoded:
            return decoded
        if answer.status_code in _SIZE_STATUSES:
            raise TooMuch(
                f"{self._place(url)}: HTTP {answer.status_code} instead of an answer;"
                f" {CHECK_ADDRESS}"
            )
        raise requests.HTTPError(response=answer)

    @property
    def _session(self) -> requests.Session:
        """One for each thread."""
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = http.open_session()
        return session

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return _HEADERS
        try:
            token = read_secret(self._token_file, "this node's token for the account service")
        except SecretError:
            return _HEADERS  # the answer says that one is expected
        return {**_HEADERS, "Authorization": f"Bearer {token}"}

    def _place(self, url: str) -> str:
        return f"{url} ({self._key})" if self._key else url


_HEADERS = {"Content-Type": "application/json"}
_HEXADECIMAL = frozenset(
    (
        "eth_blockNumber", "eth_call", "eth_chainId", "eth_estimateGas", "eth_gasPrice", "eth_getCode",
        "eth_getTransactionCount", "eth_sendRawTransaction",
    )
)  # fmt: skip
"""What these answer is always text such as 0x0; web3 would fall over anything else."""
_TELLING = frozenset(("eth_call", "eth_estimateGas", "eth_getLogs", "eth_sendRawTransaction"))
"""Whose errors are about what was asked: a refusal by the contract or the pool, or a range that is
too large."""
_SIZE_STATUSES = (400, 413, 414, 422)
_THROTTLING_CODES = (429, -32029, -32016)
_THROTTLING = re.compile(
    r"rate.?limit|too many requests|request (count|rate) exceeded|exceeded.*(quota|capacity|compute"
    r" units)"
    r"|capacity exceeded|throttl|requests? per (second|minute|day)|daily request|credits",
    re.IGNORECASE,
)
_NODE_TROUBLE = re.compile(
    r"header not found|missing trie node|block not found|unknown block|(state|history).*(not"
    r" available|unavailable)"
    r"|pruned|no state available|not synced|still syncing|internal (server )?error|resource"
    r" (unavailable|not found)"
    r"|distance to target block|bad gateway|no healthy|no backend|world state (is"
    r" )?(not|un)available|temporarily",
    re.IGNORECASE,
)
"""What nodes say that lack a block or its state, are behind, or have trouble of their own."""
_REVERT = re.compile(
    r"revert|invalid opcode|vm execution error|bad instruction|out of gas", re.IGNORECASE
)
CHECK_ADDRESS = "check that this is a chain's address"


def _is_hexadecimal(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(r"0x[0-9a-fA-F]*", value) is not None


def is_revert(text: str) -> bool:
    """Return whether the text of a JSON-RPC error says that the call reverted, as clients word
    that."""
    return _REVERT.search(text) is not None


def _is_throttling(code: object, text: str) -> bool:
    """Return whether an error asks for fewer requests. -32005 alone is not a sign: logs and gas
    have such limits too."""
    return code in _THROTTLING_CODES or _THROTTLING.search(text) is not None


def _named_seconds(error: Any) -> float | None:
    """Return how long to wait, as some nodes say it in the error's data: {"rate":
    {"backoff_seconds": 30}}."""
    try:
        return float(error["data"]["rate"]["backoff_seconds"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header names, as a number or as a date; None if there is none
    that is readable."""
    text = headers.get("Retry-After", "").strip()
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None


@contextmanager
def translated(place: str, patience_seconds: float) -> Iterator[None]:
    """Turn what requests raises about the connection to `place` into ChainUnreachable and
    ChainError."""
    try:
        yield
    except requests.Timeout:
        raise ChainUnreachable(
            f"{place}: no answer within {patience_seconds:g} s; check that it runs and can be"
            " reached"
        ) from None
    except http.AnswerTooLong:
        megabytes = http.MAX_ANSWER_BYTES >> 20
        raise TooMuch(f"{place}: an answer of more than {megabytes} MiB; {CHECK_ADDRESS}") from None
    except requests.HTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise TokenRefused(
                f"{place}: HTTP 401: answers only with a node's token; `hivewright enrol` fetches"
                " it (chain.account_token_file says from where it is read)"
            ) from None
        raise ChainUnreachable(
            f"{place}: HTTP {status} instead of an answer; check what serves this address"
        ) from None
    except requests.exceptions.JSONDecodeError:
        raise BadAnswer(
            f"{place}: the answer is not JSON; check that this is the right address"
        ) from None
    except requests.RequestException as error:
        raise ChainUnreachable(
            f"{place}: no connection ({type(error).__name__}); check that it runs and can be"
            " reached"
        ) from None
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        RecursionError,
    ):  # the last: nested without end
        raise BadAnswer(f"{place}: the answer is not JSON-RPC; {CHECK_ADDRESS}") from None


def _is_throttled(error: ChainError) -> bool:
    return isinstance(error, Throttled)


def _combined(errors: Sequence[ChainError]) -> ChainError:
    """One error for all addresses: unreachable if any may come back, and only then a wrong
    chain."""
    if len(errors) == 1:
        return errors[0]
    text = "; ".join(str(error) for error in errors)
    if any(isinstance(error, ChainUnreachable) for error in errors):
        return ChainUnreachable(text)
    return (
        errors[0]
        if all(isinstance(error, WrongChain) for error in errors[1:])
        else ChainError(text)
    )

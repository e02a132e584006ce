"""JSON-RPC over one or several addresses of a chain: one is used until it fails, then the next.

An address is used only while it answers with the expected chain id, which is verified after every
failure and once a minute. Any request may be sent twice: reads change nothing, and a signed
transaction that arrives a second time is the same transaction.
"""

import itertools
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""Pause before the only address is retried, because a restarting node refuses connections."""


_MOST_REST_SECONDS = 60.0
"""Limit of Retry-After, because a broken proxy must not stop a role for a day."""
_LEAST_REST_SECONDS = 1.0
"""Pause of an address that throttles without a duration."""


_MOST_TOGETHER = 20
"""The account service's limit on a batch (gate.MAX_BATCH)."""


class WrongChain(ChainError):
    """The address answers with another chain id."""


class Throttled(ChainUnreachable):
    """The address asks for fewer requests; it is not used again for `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class TooMuch(BadAnswer):
    """The request or its answer is too large for the address; split it."""


class TokenRefused(ChainUnreachable):
    """The address requires a token, or refuses ours."""


class Rpc(JSONBaseProvider):
    """A web3 provider for `urls` of one chain. `key` names the setting that they come from.

    A request ends within about `timeout_seconds`, including retries. `chain_id` None: it is not
    verified. Requests raise ChainUnreachable if no address answers, BadAnswer if the answers are
    unusable, WrongChain if they are of another chain. An address that throttles (HTTP 429) is not
    used for as long as it asks. `token_file`: its content is sent with every request; it is read
    each time, and may be missing. Thread-safe.
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
        # Start at a random id, so that a proxy that mixes up answers never sees an id twice.
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
        """Times at which addresses that throttled may be used again."""
        self._one_by_one: set[str] = set()
        """Addresses that do not accept batches."""
        self._sessions = threading.local()

    @property
    def source(self) -> str:
        """The addresses and their setting, for messages."""
        return f"{', '.join(self._urls)} ({self._key})" if self._key else ", ".join(self._urls)

    def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        if method == "eth_chainId" and self._chain_id is not None:
            # web3 asks for the chain id before every call; it was verified within the last minute.
            self.choose()
            return RPCResponse(jsonrpc="2.0", id=0, result=hex(self._chain_id))

        def ask(url: str) -> RPCResponse:
            answer = self._ask(url, method, params)
            self._require_use(url, method, answer)
            return answer

        return self._first(ask)

    def ask_all(
        self,
        method: str,
        many: Sequence[Sequence[object]],
    ) -> list[str | None]:
        """Send one method with each of the parameters as a batch, and return hexadecimal answers.

        None in the place of a missing answer: refused, mixed up, or the address does not answer or
        accepts no batches. Send such a request alone with `make_request`, which tries the other
        addresses and raises the error.
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
                return _hexadecimal_results(answers, asked)
            self._one_by_one.add(url)
        return [None] * len(many)

    def is_connected(self, show_traceback: bool = False) -> bool:
        try:
            self.make_request(RPCEndpoint("web3_clientVersion"), [])
        except ChainError:
            return False
        return True

    def survey(self) -> None:
        """Ask every address for its chain id, and log wrong ones. Raises if none is usable."""
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
        """Return an address for a request that the caller sends itself; report to `failed`."""
        return self._first(lambda url: url)

    def failed(self, url: str) -> None:
        """Note that the address gave no answer, so that the next one is tried."""
        self._vouched_until.pop(url, None)
        with self._lock:
            if url == self._current:
                place = self._urls.index(url) + 1
                self._current = self._urls[place % len(self._urls)]

    def throttled(
        self,
        url: str,
        headers: Mapping[str, str],
    ) -> Throttled:
        """Return the error for an HTTP 429 that the caller got; the address rests from now on."""
        return self._rest(url, "HTTP 429", retry_after(headers))

    @property
    def num_addresses(self) -> int:
        return len(self._urls)

    # ----

    def _turns(self) -> list[str]:
        """Return the addresses in the order to try: the last one used first, wrong chains last."""
        others = [url for url in self._urls if url != self._current]
        order = sorted([self._current, *others], key=lambda url: url in self._wrong)
        return (order * _LEAST_TRIES)[: self._tries]

    def _first(
        self,
        use: Callable[[str], _Result],
    ) -> _Result:
        """Return the result of `use` for the first usable address; each may be tried several times.

        An address that throttled once and failed once is tried once more: throttling is not a
        failure.
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
        """Wait before an address is retried, for as long as it rests, if the deadline allows."""
        rest = self._rests_until.get(url, 0.0) - time.monotonic()
        if time.monotonic() + rest < deadline:
            time.sleep(max(rest, _PAUSE_SECONDS))

    def _require_rested(self, url: str) -> None:
        rest = self._rests_until.get(url, 0.0) - time.monotonic()
        if rest > 0:
            raise Throttled(
                f"{self._place(url)}: throttles; it is asked again in {rest:.0f} s", rest
            )

    def _rest(
        self,
        url: str,
        said: str,
        seconds: float | None,
    ) -> Throttled:
        rest = min(
            _MOST_REST_SECONDS, _LEAST_REST_SECONDS if seconds is None else max(0.0, seconds)
        )
        self._rests_until[url] = time.monotonic() + rest
        advice = "ask less often (chain.poll_seconds), or add addresses to chain.rpc_url"
        return Throttled(
            f"{self._place(url)}: throttles ({said}), wants {rest:g} s; {advice}", rest
        )

    def _require_use(
        self,
        url: str,
        method: str,
        answer: RPCResponse,
    ) -> None:
        """Raise if the answer is an error of this node, which another node may not have."""
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
    def _using(
        self,
        url: str,
        switch: bool = True,
    ) -> Iterator[None]:
        """Record the outcome of using the address, after verifying its chain id."""
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
        vouched_until = self._vouched_until.get(url, 0.0)
        if self._chain_id is None or vouched_until > time.monotonic():
            return
        answer = self._ask(url, RPCEndpoint("eth_chainId"), [])
        if "result" not in answer:
            self._require_use(url, "eth_chainId", answer)
        try:
            found = int(answer["result"], 16)
        except (KeyError, ValueError):  # no result because of an error, or only "0x"
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

    def _ask(
        self,
        url: str,
        method: RPCEndpoint,
        params: Any,
    ) -> RPCResponse:
        body = self.encode_rpc_request(method, params)
        decoded = self._post(url, body)
        if not isinstance(decoded, dict) or not decoded.keys() & {"result", "error"}:
            raise BadAnswer(f"{self._place(url)}: the answer is not JSON-RPC; {CHECK_ADDRESS}")
        if decoded.get("error") is None and "result" in decoded:
            decoded.pop("error", None)
        if "error" not in decoded:
            self._require_form(url, method, decoded["result"])
        # A proxy may mix up answers. An error about an invalid request has no id.
        asked_id, its_id = json.loads(body)["id"], decoded.get("id")
        if its_id is not None and its_id != asked_id:
            raise ChainUnreachable(
                f"{self._place(url)}: the answer is to another request; check the proxies between"
            )
        return cast(RPCResponse, decoded)

    def _require_form(
        self,
        url: str,
        method: str,
        result: object,
    ) -> None:
        """Raise BadAnswer for a result of the wrong type."""
        if method in _HEXADECIMAL and not _is_hexadecimal(result):
            form = "hexadecimal number"
        elif method == "eth_getLogs" and not isinstance(result, list):
            form = "list"
        else:
            return
        raise BadAnswer(f"{self._place(url)}: {method} is answered with no {form}; {CHECK_ADDRESS}")

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

    def _decode_refusal(
        self,
        url: str,
        answer: requests.Response,
    ) -> Any:
        """Return the JSON-RPC error in an answer with HTTP status 400 to 499."""
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
        """The session of this thread."""
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
            return _HEADERS  # the answer will say that a token is required
        return {**_HEADERS, "Authorization": f"Bearer {token}"}

    def _place(self, url: str) -> str:
        return f"{url} ({self._key})" if self._key else url


_HEADERS = {"Content-Type": "application/json"}
_HEXADECIMAL = frozenset(
    (
        "eth_blockNumber",
        "eth_call",
        "eth_chainId",
        "eth_estimateGas",
        "eth_gasPrice",
        "eth_getCode",
        "eth_getTransactionCount",
        "eth_sendRawTransaction",
    )
)
"""Methods that answer with text such as 0x0; web3 fails on anything else."""
_TELLING = frozenset(("eth_call", "eth_estimateGas", "eth_getLogs", "eth_sendRawTransaction"))
"""Methods whose errors are about the request: a refusal by contract or pool, or a large range."""
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
"""Messages of nodes that lack a block or its state, are behind, or have an internal error."""
_REVERT = re.compile(
    r"revert|invalid opcode|vm execution error|bad instruction|out of gas", re.IGNORECASE
)
CHECK_ADDRESS = "check that this is a chain's address"


def _is_hexadecimal(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(r"0x[0-9a-fA-F]*", value) is not None


def _hexadecimal_results(
    answers: list[Any],
    ids: Iterable[int],
) -> list[str | None]:
    """Return the results for the ids, in that order; None for one that is not hexadecimal."""
    found = {}
    for answer in answers:
        if isinstance(answer, dict) and _is_hexadecimal(answer.get("result")):
            found[answer.get("id")] = answer["result"]
    return [found.get(id) for id in ids]


def is_revert(text: str) -> bool:
    """Return whether the text of a JSON-RPC error says that the call reverted."""
    return _REVERT.search(text) is not None


def _is_throttling(code: object, text: str) -> bool:
    """Return whether an error asks for fewer requests.

    -32005 alone is not a sign: nodes use it for limits on logs and gas too.
    """
    return code in _THROTTLING_CODES or _THROTTLING.search(text) is not None


def _named_seconds(error: Any) -> float | None:
    """Return the wait in the error's data, as some nodes send it.

    Its form is {"rate": {"backoff_seconds": 30}}; None if it is missing.
    """
    try:
        return float(error["data"]["rate"]["backoff_seconds"])
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in a Retry-After header, a number or a date; None if there are none."""
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
def translated(
    place: str,
    patience_seconds: float,
) -> Iterator[None]:
    """Translate requests' exceptions about `place` into ChainUnreachable and ChainError."""
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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        # RecursionError: nested too deeply.
        raise BadAnswer(f"{place}: the answer is not JSON-RPC; {CHECK_ADDRESS}") from None


def _is_throttled(error: ChainError) -> bool:
    return isinstance(error, Throttled)


def _combined(errors: Sequence[ChainError]) -> ChainError:
    """Return one error for all addresses: ChainUnreachable if any may recover.

    It is WrongChain only if all are of other chains.
    """
    if len(errors) == 1:
        return errors[0]
    text = "; ".join(str(error) for error in errors)
    if any(isinstance(error, ChainUnreachable) for error in errors):
        return ChainUnreachable(text)
    if all(isinstance(error, WrongChain) for error in errors[1:]):
        return errors[0]
    return ChainError(text)

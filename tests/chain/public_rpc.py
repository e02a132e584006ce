"""A proxy in front of a real anvil that behaves like a public RPC address.

It limits eth_getLogs, throttles, sometimes gives useless answers, and has pruned old state. anvil
itself replaces blocks (`reorganise`), as a proxy could only pretend to.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

# How providers word the limit of eth_getLogs: status, code, message.
RANGE_DIALECTS: dict[str, tuple[int, int, str]] = {
    "exceeds": (200, -32602, "range {asked} exceeds limit of {limit}"),
    "results": (200, -32005, "query returned more than 10000 results"),
    "larger": (
        200,
        -32000,
        "block range is larger than max block range, block range = {asked}, max = {limit}",
    ),
    "free-tier": (
        400,
        -32600,
        (
            "Under the Free tier plan, you can make eth_getLogs requests with up to a {limit} block"
            " range."
        ),
    ),
    "narrow": (200, -32000, "query block range exceeds server limit, narrow your filter: {limit}"),
    "html": (413, 0, "<html><body>413 Request Entity Too Large</body></html>"),
}
# Answers of no use, as (status, content type, body); None for the body of a cut answer.
ODD_ANSWERS: dict[str, tuple[int, str, bytes]] = {
    "html": (200, "text/html", b"<html><body>Checking your browser</body></html>"),
    "bad-gateway": (502, "text/html", b"<html>502 Bad Gateway</html>"),
    "truncated": (200, "application/json", b'{"jsonrpc":"2.0","id":1,"resu'),
    "empty": (200, "application/json", b""),
    "error-text": (200, "application/json", b'{"error":"upstream timed out"}'),
    "no-header": (200, "application/json", b'{"code":-32000,"message":"header not found"}'),
    "missing-node": (
        200,
        "application/json",
        b'{"code":-32000,"message":"missing trie node 1f (path )"}',
    ),
    "limit": (
        200,
        "application/json",
        b'{"code":-32005,"message":"daily request count exceeded, rate limited"}',
    ),
    "null": (200, "application/json", b"null"),
}


@dataclass
class PublicRpc:
    """The proxy at `url` and its behaviour; every field may be changed while it runs.

    After `throttle_after` requests it answers 429 with a `Retry-After` of `retry_after` seconds
    until that time is over. `odd` names the useless answer to requests for which `is_odd` is true.
    State before block `pruned_before` is gone.
    """

    target: str
    url: str = ""
    range_limit: int | None = None
    dialect: str = "exceeds"
    throttle_after: int | None = None
    retry_after: float = 1.0
    odd: str | None = None
    is_odd: Callable[[str, int], bool] = lambda method, number: True
    pruned_before: int = 0
    forgets_as_empty: bool = False
    """Pruned state is answered as if it were empty, as some nodes do."""
    behind: int = 0
    """Number of the newest blocks that it lacks."""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    early: int = 0
    """Number of requests before a Retry-After was over."""
    _throttled_until: float = 0.0
    _since_throttle: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def methods(self) -> Counter[str]:
        return Counter(method for method, _ in self.asked)

    def ranges(self) -> list[int]:
        """Return the number of blocks of each eth_getLogs."""
        return [_width(params) for method, params in self.asked if method == "eth_getLogs"]

    def answer(self, call: dict[str, Any]) -> tuple[int, str, bytes, dict[str, str]] | None:
        """Return status, type, body and headers of a refusal; None: the chain answers."""
        method, params = call["method"], call.get("params", [])
        with self._lock:
            self.asked.append((method, params))
            number = len(self.asked)
            if (throttled := self._throttle()) is not None:
                return throttled
        if self.odd is not None and self.is_odd(method, number):
            self.injected[self.odd] += 1
            status, kind, body = ODD_ANSWERS[self.odd]
            if body.startswith(b'{"code"'):
                body = json.dumps(
                    {"jsonrpc": "2.0", "id": call["id"], "error": json.loads(body)}
                ).encode()
            elif self.odd == "null":
                body = json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": None}).encode()
            return status, kind, body, {}
        if (
            method == "eth_getLogs"
            and self.range_limit is not None
            and _width(params) > self.range_limit
        ):
            return self._refuse_range(call, _width(params))
        if self._is_pruned(method, params):
            self.injected["pruned"] += 1
            if self.forgets_as_empty:
                body = json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": "0x"}).encode()
                return 200, "application/json", body, {}
            error = {
                "code": -32000,
                "message": "missing trie node 5f3a (path ) state 0x5f3a is not available",
            }
            return (
                200,
                "application/json",
                json.dumps({"jsonrpc": "2.0", "id": call["id"], "error": error}).encode(),
                {},
            )
        return None

    def seen_from_behind(self, call: dict[str, Any]) -> dict[str, Any] | None:
        """Return the call as a node without the newest blocks sees it; None if it can't."""
        if not self.behind:
            return call
        newest = int(ask(self.target, "eth_blockNumber"), 16) - self.behind
        text = json.dumps(call["params"]).replace('"latest"', f'"{newest:#x}"')
        params = json.loads(text)
        if call["method"] == "eth_getBlockByNumber" and int(params[0], 16) > newest:
            return None
        if call["method"] == "eth_getLogs":
            params[0] |= {"toBlock": hex(min(newest, int(params[0]["toBlock"], 16)))}
            if int(params[0]["fromBlock"], 16) > newest:
                params[0] |= {"fromBlock": hex(newest), "address": "0x" + "99" * 20}
        return {**call, "params": params}

    def _throttle(self) -> tuple[int, str, bytes, dict[str, str]] | None:
        if self.throttle_after is None:
            return None
        now = time.monotonic()
        if now < self._throttled_until:
            self.early += 1
        else:
            self._since_throttle += 1
            if self._since_throttle <= self.throttle_after:
                return None
            self._since_throttle = 0
            self._throttled_until = now + self.retry_after
        self.injected["429"] += 1
        return 429, "text/plain", b"Too Many Requests", {"Retry-After": f"{self.retry_after:g}"}

    def _refuse_range(
        self, call: dict[str, Any], width: int
    ) -> tuple[int, str, bytes, dict[str, str]]:
        self.injected["range"] += 1
        status, code, text = RANGE_DIALECTS[self.dialect]
        if not code:
            return status, "text/html", text.encode(), {}
        error = {"code": code, "message": text.format(asked=width, limit=self.range_limit)}
        body = json.dumps({"jsonrpc": "2.0", "id": call["id"], "error": error}).encode()
        return status, "application/json", body, {}

    def _is_pruned(self, method: str, params: Any) -> bool:
        if method not in ("eth_getCode", "eth_call", "eth_getStorageAt", "eth_getTransactionCount"):
            return False
        place = params[-1]
        return (
            isinstance(place, str)
            and place.startswith("0x")
            and int(place, 16) < self.pruned_before
        )


def _width(params: Any) -> int:
    return int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) + 1


@contextmanager
def public(target: str, **behaviour: Any) -> Iterator[PublicRpc]:
    """Run the proxy in front of `target` until the block ends."""
    proxy = PublicRpc(target, **behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            call = json.loads(body)
            calls = call if isinstance(call, list) else [call]
            refusals = [refusal for each in calls if (refusal := proxy.answer(each)) is not None]
            if refusals:
                self._send(*refusals[0])
                return
            if not isinstance(call, list):
                seen = proxy.seen_from_behind(call)
                if seen is None:
                    nothing = {"jsonrpc": "2.0", "id": call["id"], "result": None}
                    self._send(200, "application/json", json.dumps(nothing).encode(), {})
                    return
                body = json.dumps(seen).encode()
            headers = {"Content-Type": "application/json"}
            answer = requests.post(proxy.target, data=body, headers=headers, timeout=20)
            if proxy.behind and call["method"] == "eth_blockNumber":
                newest = int(answer.json()["result"], 16) - proxy.behind
                told = {"jsonrpc": "2.0", "id": call["id"], "result": hex(newest)}
                self._send(200, "application/json", json.dumps(told).encode(), {})
                return
            self._send(answer.status_code, "application/json", answer.content, {})

        def _send(self, status: int, kind: str, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                **headers,
            }.items():
                self.send_header(name, value)
            try:
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:  # the client has not waited
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def ask(url: str, method: str, *params: Any) -> Any:
    """Send a request to the anvil directly, past the proxy."""
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
    answer = requests.post(url, json=body, timeout=20).json()
    assert "error" not in answer, answer
    return answer["result"]


def mine(url: str, blocks: int) -> None:
    ask(url, "anvil_mine", hex(blocks))


def reorganise(url: str, depth: int = 3) -> None:
    """Replace the last `depth` blocks by empty ones, so that their transactions are gone."""
    ask(url, "anvil_reorg", depth, [])

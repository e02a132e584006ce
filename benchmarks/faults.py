"""A bad network: HTTP proxies in front of a chain or an account service that inject faults."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

LATE_SECONDS = 0.3
HANG_SECONDS = 3.0
ALL_KINDS = ("drop", "lose", "error", "twice", "stale", "late", "elsewhere")


@dataclass
class FaultyProxy:
    """A proxy in front of `target`. `fault` maps a request to a kind of fault, or None.

    * drop: the connection is closed before the request is forwarded.
    * hang: the same, after HANG_SECONDS.
    * lose: the request is forwarded, the answer is not.
    * error: HTTP 500, and the request is not forwarded.
    * twice: the request is forwarded twice, and the second answer returned.
    * lie: a transaction hash is returned, and the request is not forwarded.
    * stale: the request is forwarded, and the answer to the previous one returned.
    * late: the request is forwarded after LATE_SECONDS.
    * elsewhere: the answer of a chain with id 1.
    * alone: the answer of a node that accepts no batches.
    """

    target: str
    fault: Callable[[str], str | None]
    url: str = ""
    seen: list[str] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)


class _Handler(BaseHTTPRequestHandler):
    """Passes requests on to the proxy's target, or answers them as the injected fault says."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def setup(self) -> None:
        super().setup()
        self.onwards = requests.Session()
        self.onwards.trust_env = False

    def finish(self) -> None:
        self.onwards.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output free of access logs."""

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy = self.server.proxy
        said = self.path + " " + body.decode()
        proxy.seen.append(said)
        kind = proxy.fault(said)
        proxy.injected[kind or "none"] += 1
        if kind in ("drop", "hang"):
            time.sleep(HANG_SECONDS if kind == "hang" else 0)
            self.close_connection = True
        elif (answer := _invented_answer(kind, body)) is not None:
            self._answer(*answer)
        else:
            self._pass_on(kind, body)

    def _pass_on(self, kind: str | None, body: bytes) -> None:
        if kind == "late":
            time.sleep(LATE_SECONDS)
        names = ("Authorization", "Content-Type")
        kept = {name: self.headers[name] for name in names if name in self.headers}
        url = self.server.proxy.target + self.path
        for _ in range(2 if kind == "twice" else 1):
            try:
                answer = self.onwards.request(
                    self.command, url, data=body, headers=kept, timeout=10
                )
            except requests.RequestException:  # the target may be slow or gone
                self.close_connection = True
                return
        if kind == "lose":
            self.close_connection = True
            return
        before, self.server.last_answer = self.server.last_answer, answer.content
        self._answer(answer.status_code, before if kind == "stale" else answer.content)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        try:
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the client closed the connection before the answer
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, proxy: FaultyProxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy
        self.last_answer = b"{}"


@contextmanager
def faulty(target: str, fault: Callable[[str], str | None]) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, fault)
    server = _Server(proxy)
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _invented_answer(kind: str | None, body: bytes) -> tuple[int, bytes] | None:
    """Return status and content of a fault that does not reach the target; None: it does."""
    if kind == "alone":
        error = {"code": -32600, "message": "batches are not served here"}
        return 200, json.dumps({"jsonrpc": "2.0", "id": None, "error": error}).encode()
    if kind == "error":
        return 500, b'{"error":"out of order"}'
    if kind == "lie":
        return 200, b'{"hash": "0x' + b"11" * 32 + b'"}'
    if kind == "elsewhere":
        asked = json.loads(body)
        many = isinstance(asked, list)
        told = [_told_elsewhere(each) for each in asked] if many else _told_elsewhere(asked)
        return 200, json.dumps(told).encode()
    return None


def _told_elsewhere(asked: dict[str, object]) -> dict[str, object]:
    return {
        "jsonrpc": "2.0",
        "id": asked["id"],
        "result": "0x1" if asked["method"] == "eth_chainId" else None,
    }


def at_random(
    seed: int, share: float, kinds: Sequence[str] = ("drop", "lose", "error", "twice")
) -> Callable[[str], str | None]:
    """Return a fault for `share` of the requests, reproducible by `seed`."""
    rng = random.Random(seed)
    return lambda _: rng.choice(kinds) if rng.random() < share else None

"""A foreign judge over HTTP, which says what a test tells it to say."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Desk:
    """The judge's answer to every GET. `pause_seconds`: time between two bytes.

    `paths`: what was asked for. Each answer names another address, which counts for redirects.
    """

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.pause_seconds = 0.0
        self.past: bytes | None = None
        self.paths: list[str] = []
        self.url = ""

    def say(self, game: int, round: int, rounds_remaining: int, *choices: str) -> None:
        clue = {
            "game_id": game,
            "clue_id": round,
            "rounds_remaining": rounds_remaining,
            "clue": "which?",
            "choices": list(choices),
        }
        self.body = json.dumps(clue).encode()


@contextmanager
def judging() -> Iterator[Desk]:
    """Serve a judge until the block ends."""
    told = Desk()
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.paths.append(self.path)
            is_past = self.path == "/api/games"
            body = told.past if is_past else told.body
            self.send_response(404 if body is None else told.status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if not told.pause_seconds:
                self.wfile.write(body or b"")
                return
            for byte in body or b"":
                if is_over.wait(told.pause_seconds):
                    return
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    return

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        told.url = f"http://127.0.0.1:{server.server_port}"
        yield told
        is_over.set()
        server.shutdown()


def waited(condition, seconds: float = 20.0) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)

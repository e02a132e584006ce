"""HTTP of the chain's clients: the size and the time of a whole answer are bounded."""

import gzip
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from worker.chain import http
from worker.chain.http import AnswerTooLong, open_session, socket_name


class Script(socketserver.BaseRequestHandler):
    """Answers every request with its server's pieces, with a pause between them."""

    def handle(self) -> None:
        request = b""
        while b"\r\n\r\n" not in request and (piece := self.request.recv(65536)):
            request += piece
        self.server.seen.append(request)
        for piece in self.server.pieces:
            try:
                self.request.sendall(piece)
            except OSError:
                return
            time.sleep(self.server.pause)


class Tcp(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


class Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@contextmanager
def serving(*pieces: bytes, pause: float = 0.0, path: Path | None = None) -> Iterator[Tcp | Unix]:
    server = Tcp(("127.0.0.1", 0), Script) if path is None else Unix(socket_name(path), Script)
    server.pieces, server.pause, server.seen = pieces, pause, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url_of(server: Tcp) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/"


def head(length: int, *more: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {length}", "Connection: close", *more, "", ""]
    return "\r\n".join(lines).encode()


def test_answer_comes_whole_though_it_comes_in_pieces() -> None:
    with serving(head(6), b"abc", b"def", pause=0.01) as server, open_session() as session:
        assert session.get(url_of(server), timeout=10).content == b"abcdef"


def test_compressed_answer_is_decompressed() -> None:
    body = gzip.compress(b"text" * 100)
    with serving(head(len(body), "Content-Encoding: gzip"), body) as server:
        assert open_session().get(url_of(server), timeout=10).text == "text" * 100


def test_answer_that_says_it_is_compressed_and_is_not_is_an_error() -> None:
    with (
        serving(head(4, "Content-Encoding: gzip"), b"text") as server,
        pytest.raises(requests.exceptions.ContentDecodingError),
    ):
        open_session().get(url_of(server), timeout=10)


def test_slow_answer_ends_in_time_though_each_piece_is_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = [head(1000), *[b"x"] * 1000]
    with serving(*pieces, pause=0.05) as server:
        began = time.monotonic()
        with pytest.raises(requests.ReadTimeout, match="not complete in time"):
            open_session().get(url_of(server), timeout=0.4)
        assert time.monotonic() - began < 10


def test_silent_server_is_a_timeout() -> None:
    with serving(head(4), b"te", pause=3) as server, pytest.raises(requests.ReadTimeout):
        open_session().get(url_of(server), timeout=0.3)


def test_long_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1000)
    with serving(head(1000), b"x" * 1000) as server:
        assert len(open_session().get(url_of(server), timeout=10).content) == 1000
    with (
        serving(head(1001), b"x" * 1001) as server,
        pytest.raises(AnswerTooLong, match="more than 1000 bytes"),
    ):
        open_session().get(url_of(server), timeout=10)


def test_compressed_bomb_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(64 << 20))
    with (
        serving(head(len(bomb), "Content-Encoding: gzip"), bomb) as server,
        pytest.raises(AnswerTooLong),
    ):
        open_session().get(url_of(server), timeout=20)


def test_answer_that_breaks_off_is_a_connection_error() -> None:
    with serving(head(10), b"half") as server, pytest.raises(requests.ConnectionError):
        open_session().get(url_of(server), timeout=10)


def test_proxies_and_netrc_of_the_environment_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(head(2), b"ok") as server:
        headers = {"Authorization": "Bearer ours"}
        assert open_session().get(url_of(server), headers=headers, timeout=10).text == "ok"
        assert b"Authorization: Bearer ours" in server.seen[0]


def test_unix_socket_answers_like_a_port(tmp_path: Path) -> None:
    path = tmp_path / "chain.sock"
    with serving(head(2), b"ok", path=path) as server:
        assert open_session().post(f"unix:{path}", data=b"{}", timeout=10).text == "ok"
        assert server.seen[0].startswith(b"POST / HTTP/1.1\r\n")


def test_socket_with_a_long_path_can_be_used(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    path = folder / "chain.sock"
    assert len(socket_name(path)) <= 107
    with serving(head(2), b"ok", path=path):
        assert open_session().get(f"unix:{path}", timeout=10).text == "ok"


def test_short_path_is_used_as_it_is(tmp_path: Path) -> None:
    assert socket_name(Path("/run/chain.sock")) == "/run/chain.sock"


def test_socket_that_nobody_serves_is_a_connection_error(tmp_path: Path) -> None:
    path = tmp_path / "chain.sock"
    with socket.socket(socket.AF_UNIX) as unserved:
        unserved.bind(str(path))
    for missing in (path, tmp_path / "none.sock"):
        with pytest.raises(requests.ConnectionError):
            open_session().get(f"unix:{missing}", timeout=1)

"""Conversations with peers, and limits on how many and how often untrusted peers may have them."""

import asyncio
import contextlib
from collections import Counter

import pytest

from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import HEADER_BYTES, Kind, Refused
from worker.swarm.transport import streams
from worker.swarm.transport.streams import (
    MAX_PEERS_REMEMBERED,
    MAX_REQUESTS_PER_PEER,
    MAX_STREAMS,
    MAX_STREAMS_PER_PEER,
    REQUEST_WINDOW_SECONDS,
    Admission,
    Rate,
    Stream,
    counted,
)


class Writer:
    def __init__(self) -> None:
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass


class Ends:
    """A stream, what its peer wrote (`reader`), and what it has sent (`writer`)."""

    def __init__(self, received: bytes = b"", *, is_complete: bool = True) -> None:
        self.reader, self.writer = asyncio.StreamReader(), Writer()
        self.reader.feed_data(received)
        if is_complete:
            self.reader.feed_eof()
        self.traffic: Counter[str] = Counter()
        self.stream = Stream(self.reader, self.writer, self.traffic)  # type: ignore[arg-type]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock, in its only element."""
    clock = [1000.0]
    monkeypatch.setattr(streams.time, "monotonic", lambda: clock[0])
    return clock


def test_bytes_are_counted_in_both_directions() -> None:
    async def run() -> Ends:
        ends = Ends(messages.encode_frame(Kind.PEERS, b"abc"))
        assert await ends.stream.ask(b"request", 1000) == (Kind.PEERS, b"abc")
        return ends

    ends = asyncio.run(run())
    assert ends.writer.sent == b"request"
    assert ends.traffic == {"out": 7, "in": HEADER_BYTES + 3}


def test_silent_peer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ANSWER_TIMEOUT_SECONDS", 0.02)

    async def run() -> None:
        await Ends(is_complete=False).stream.ask(b"request", 1000)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_answer_that_has_begun_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "ANSWER_TIMEOUT_SECONDS", 0.05)
    frame = messages.encode_frame(Kind.PEERS, b"abcdef")

    async def run() -> tuple[Kind, bytes]:
        ends = Ends(frame[: HEADER_BYTES + 1], is_complete=False)

        async def finish() -> None:
            await asyncio.sleep(0.2)
            ends.reader.feed_data(frame[HEADER_BYTES + 1 :])

        finishing = asyncio.create_task(finish())
        answer = await ends.stream.ask(b"request", 1000)
        await finishing
        return answer

    assert asyncio.run(run()) == (Kind.PEERS, b"abcdef")


def test_refusal_reaches_a_peer_that_is_still_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LINGER_SECONDS", 0.05)

    async def run() -> bytes:
        ends = Ends(b"x" * 200_000, is_complete=False)
        await ends.stream.refuse("flood", "too many")
        assert len(ends.reader._buffer) == 0  # type: ignore[attr-defined]
        return ends.writer.sent

    async def read(data: bytes) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        await messages.read_frame(reader, 1000)

    with pytest.raises(Refused, match="too many") as refused:
        asyncio.run(read(asyncio.run(run())))
    assert refused.value.reason == "flood"


def test_count_of_zero_is_forgotten_also_after_an_error() -> None:
    counter: Counter[str] = Counter()

    def fail() -> None:
        with counted(counter, "a"), counted(counter, "a"):
            assert counter == {"a": 2}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert counter == {}


def test_rate_is_within_a_sliding_window(now: list[float]) -> None:
    rate = Rate(3)
    for second in (0.0, 1.0, 2.0):
        now[0] = 1000 + second
        assert rate.allows("a")
    now[0] = 1000 + REQUEST_WINDOW_SECONDS - 0.1
    assert not rate.allows("a")
    assert rate.allows("b")
    # The first request has left the window; what was refused does not count.
    now[0] = 1000 + REQUEST_WINDOW_SECONDS
    assert rate.allows("a")
    assert not rate.allows("a")


def test_peers_that_ask_no_more_are_forgotten(now: list[float]) -> None:
    rate = Rate(2)
    assert rate.allows("busy")
    for number in range(2 * MAX_PEERS_REMEMBERED):
        rate.allows(f"once-{number}")
        now[0] += REQUEST_WINDOW_SECONDS / MAX_PEERS_REMEMBERED
    assert len(rate._recent) <= MAX_PEERS_REMEMBERED + 1


def test_flood_of_new_peers_does_not_free_one_that_is_over_its_limit(now: list[float]) -> None:
    rate = Rate(2)
    assert [rate.allows("busy") for _ in range(3)] == [True, True, False]
    for number in range(MAX_PEERS_REMEMBERED + 5):
        rate.allows(f"new-{number}")
    assert not rate.allows("busy")


def test_streams_of_a_peer_and_of_all_are_limited(now: list[float]) -> None:
    admission = Admission()
    with contextlib.ExitStack() as streams_open:
        for _ in range(MAX_STREAMS_PER_PEER):
            assert admission.refusal("a") is None
            streams_open.enter_context(admission.admitted("a"))
        refusal = admission.refusal("a")
        assert refusal is not None
        assert (refusal[0], "close one first" in refusal[1]) == ("flood", True)
        for number in range(MAX_STREAMS - MAX_STREAMS_PER_PEER):
            assert admission.refusal(f"peer-{number}") is None
            streams_open.enter_context(admission.admitted(f"peer-{number}"))
        refusal = admission.refusal("one more")
        assert refusal is not None
        assert refusal[0] == "full"
    assert admission.refusal("one more") is None


def test_requests_of_a_peer_are_limited_though_each_stream_is_short(now: list[float]) -> None:
    admission = Admission()
    for _ in range(MAX_REQUESTS_PER_PEER):
        assert admission.refusal("a") is None
        with admission.admitted("a"):
            pass
    refusal = admission.refusal("a")
    assert refusal is not None
    assert refusal[1] == f"more than {MAX_REQUESTS_PER_PEER} requests in 10 s"
    assert not admission.has_open("a")

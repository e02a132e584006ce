"""Messages about weights: they come back as they were sent, and odd ones are refused."""

import hashlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.errors import BadRecord
from worker.swarm.protocol import messages
from worker.swarm.protocol.messages import MAX_MEMBER_BYTES, MAX_PIECES, PIECE_BYTES
from worker.swarm.protocol.weight_messages import (
    Offer,
    WeightRequest,
    decode_offer,
    decode_request,
    digests_of,
    encode_offer,
    encode_request,
)

DIGEST = bytes(range(32))


def payload(frame: bytes, kind: messages.Kind) -> bytes:
    """Return the payload of a frame, after a check of its kind."""
    content = frame[len(messages.encode_frame(kind, b"")) :]
    assert frame == messages.encode_frame(kind, content)
    return content


@pytest.mark.parametrize(
    "request_",
    [
        WeightRequest(b"member", DIGEST),
        WeightRequest(b"", DIGEST, DIGEST[::-1], 7),
        WeightRequest(b"m" * MAX_MEMBER_BYTES, DIGEST, DIGEST, MAX_PIECES),
    ],
)
def test_request_comes_back(request_) -> None:
    assert decode_request(payload(encode_request(request_), messages.Kind.WEIGHTS)) == request_


@pytest.mark.parametrize(
    "fields",
    [
        (b"", DIGEST[:-1], b"", 0),
        (b"", b"", b"", 0),
        (b"", DIGEST, DIGEST[:-1], 0),
        (b"", DIGEST, DIGEST + b"x", 0),
        (b"", DIGEST, b"", -1),
        (b"", DIGEST, b"", MAX_PIECES + 1),
        (b"m" * (MAX_MEMBER_BYTES + 1), DIGEST, b"", 0),
        (b"", DIGEST, b""),
        (b"", DIGEST, None, 0),
    ],
)
def test_malformed_request_is_refused(fields) -> None:
    with pytest.raises(BadRecord) as refusal:
        decode_request(msgpack.packb(fields))
    assert refusal.value.reason == "malformed"


def offer_of(num_bytes: int, num_pieces: int) -> Offer:
    return Offer(num_bytes, 12, digests_of([bytes([n % 256]) for n in range(num_pieces)]))


@pytest.mark.parametrize(
    ("num_bytes", "num_pieces"),
    [(1, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (3 * PIECE_BYTES, 3)],
)
def test_offer_comes_back_and_its_pieces_cover_the_file(num_bytes, num_pieces) -> None:
    offer = offer_of(num_bytes, num_pieces)
    assert decode_offer(payload(encode_offer(offer), messages.Kind.OFFER)) == offer
    sizes = [offer.size_of(piece) for piece in range(num_pieces)]
    assert sum(sizes) == num_bytes
    assert all(0 < size <= PIECE_BYTES for size in sizes)


@pytest.mark.parametrize(
    ("num_bytes", "num_pieces"), [(1, 0), (1, 2), (PIECE_BYTES, 2), (PIECE_BYTES + 1, 1)]
)
def test_offer_needs_a_digest_for_each_piece(num_bytes, num_pieces) -> None:
    fields = [num_bytes, 0, b"".join(offer_of(num_bytes, num_pieces).pieces)]
    with pytest.raises(BadRecord, match=f"{num_pieces} digests for .* pieces of {PIECE_BYTES}"):
        decode_offer(msgpack.packb(fields))


@pytest.mark.parametrize(
    "fields",
    [(0, 0, b""), (1, -1, DIGEST), (1, 0, DIGEST[:-1]), (1, 0, "x" * 32), (1.0, 0, DIGEST)],
)
def test_malformed_offer_is_refused(fields) -> None:
    with pytest.raises(BadRecord) as refusal:
        decode_offer(msgpack.packb(fields))
    assert refusal.value.reason == "malformed"


def test_largest_offer_is_valid_and_one_more_piece_is_not() -> None:
    pieces = [DIGEST] * MAX_PIECES
    fields = [MAX_PIECES * PIECE_BYTES, 0, b"".join(pieces)]
    assert len(decode_offer(msgpack.packb(fields)).pieces) == MAX_PIECES
    larger = [fields[0] + 1, 0, fields[2] + DIGEST]
    with pytest.raises(BadRecord, match="not a valid message"):
        decode_offer(msgpack.packb(larger))


def test_digest_of_an_offer_is_that_of_its_pieces_in_order() -> None:
    first, second = digests_of([b"a", b"b"])
    assert first == hashlib.sha256(b"a").digest()
    offer = Offer(2, 0, (first, second))
    assert offer.digest == hashlib.sha256(first + second).digest()
    assert offer.digest != Offer(2, 0, (second, first)).digest


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_damaged_message_is_refused_or_means_something_else(data: st.DataObject) -> None:
    """A peer can send any bytes: the decoders raise nothing but BadRecord."""
    offer = offer_of(data.draw(st.sampled_from([1, PIECE_BYTES + 1])), 1)
    decode, whole = data.draw(
        st.sampled_from(
            [
                (decode_request, encode_request(WeightRequest(b"member", DIGEST, DIGEST, 3))),
                (decode_offer, encode_offer(offer)),
            ]
        )
    )
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 8)))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:]
    found, reason = _decoded(decode, damaged)
    if found is None:
        assert reason == "malformed"
    elif isinstance(found, Offer):
        assert sum(map(found.size_of, range(len(found.pieces)))) == found.num_bytes
    else:
        assert len(found.model) == 32
        assert 0 <= found.first <= MAX_PIECES


def _decoded(decode, payload: bytes) -> tuple[Offer | WeightRequest | None, str]:
    try:
        return decode(payload), ""
    except BadRecord as error:
        return None, error.reason

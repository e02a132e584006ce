"""Messages about weights: a request, the answer with an offer, and pieces of a file.

An offer lists the digest of every piece of a safetensors file, so each piece is checked when it
arrives, and a transfer that broke off continues with the next piece in another stream. Decoders
raise BadRecord for any invalid input, as in messages.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from worker.errors import BadRecord
from worker.swarm.protocol.codec import Schema, binary, record, whole
from worker.swarm.protocol.messages import (
    MAX_MEMBER_BYTES,
    MAX_PIECES,
    PIECE_BYTES,
    Kind,
    encode_frame,
)

DIGEST_BYTES = hashlib.sha256().digest_size

# The asker's record, the model, the digest of the offer (empty: send the offer), the first piece.
_REQUEST = Schema(
    record(
        binary(MAX_MEMBER_BYTES), binary(DIGEST_BYTES), binary(DIGEST_BYTES), whole(0, MAX_PIECES)
    )
)
# Size of the file, rounds trained, digests of the pieces.
_OFFER = Schema(record(whole(1), whole(0), binary(MAX_PIECES * DIGEST_BYTES)))


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """A request for weights of the model with the digest `model`.

    `offer`: digest of the offer whose pieces are wanted, from number `first` on; None: the offer
    itself is wanted.
    """

    member: bytes
    model: bytes
    offer: bytes | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """A file of weights: its size, the rounds that they were trained, the digest of each piece."""

    num_bytes: int
    rounds_trained: int
    pieces: tuple[bytes, ...]

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(b"".join(self.pieces)).digest()

    def size_of(self, piece: int) -> int:
        """Return the number of bytes of a piece."""
        return min(PIECE_BYTES, self.num_bytes - piece * PIECE_BYTES)


def encode_request(request: WeightRequest) -> bytes:
    fields = [request.member, request.model, request.offer or b"", request.first]
    return encode_frame(Kind.WEIGHTS, msgpack.packb(fields))


def decode_request(payload: bytes) -> WeightRequest:
    member, model, offer, first = _REQUEST.decode(payload)
    if len(model) != DIGEST_BYTES or len(offer) not in (0, DIGEST_BYTES):
        raise BadRecord("malformed", f"expected digests of {DIGEST_BYTES} bytes")
    return WeightRequest(member, model, offer or None, first)


def encode_offer(offer: Offer) -> bytes:
    fields = [offer.num_bytes, offer.rounds_trained, b"".join(offer.pieces)]
    return encode_frame(Kind.OFFER, msgpack.packb(fields))


def decode_offer(payload: bytes) -> Offer:
    num_bytes, rounds_trained, joined = _OFFER.decode(payload)
    pieces = _split(joined)
    if len(pieces) != -(-num_bytes // PIECE_BYTES):
        raise BadRecord(
            "malformed", f"{len(pieces)} digests for {num_bytes} bytes in pieces of {PIECE_BYTES}"
        )
    return Offer(num_bytes, rounds_trained, pieces)


def digests_of(content: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(piece).digest() for piece in content)


def _split(joined: bytes) -> tuple[bytes, ...]:
    if len(joined) % DIGEST_BYTES:
        raise BadRecord("malformed", f"expected digests of {DIGEST_BYTES} bytes each")
    return tuple(
        joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES)
    )

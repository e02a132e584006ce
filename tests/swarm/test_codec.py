"""Messages of untrusted peers are decoded by a schema, or refused at bounded cost."""

import msgspec
import pytest

from worker.errors import BadRecord
from worker.swarm.protocol.codec import MAX_INTEGER, Schema, at_most, binary, is_text, record, whole

SCHEMA = Schema(record(str, at_most(str, 2), whole(-1), binary(3)))


def packed(*values: object) -> bytes:
    return msgspec.msgpack.encode(values)


def test_message_comes_back_as_a_tuple() -> None:
    assert SCHEMA.decode(packed("a", ["b", "c"], -1, b"123")) == ("a", ["b", "c"], -1, b"123")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        packed("a", [], 0, b"") + b"\x00",
        packed("a", [], 0, b"")[:-1],
        packed("a", [], 0),
        packed("a", [], 0, b"", 1),
        packed(7, [], 0, b""),
        packed("a", ["b", "c", "d"], 0, b""),
        packed("a", [7], 0, b""),
        packed("a", [], -2, b""),
        packed("a", [], MAX_INTEGER + 1, b""),
        packed("a", [], 0.0, b""),
        packed("a", [], True, b""),
        packed("a", [], None, b""),
        packed("a", [], 0, b"1234"),
        b"\x91" * 100_000,
    ],
    ids=lambda data: data[:16].hex() or "empty",
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(BadRecord, match=rf"{len(data)} bytes that are not a valid message") as bad:
        SCHEMA.decode(data)
    assert bad.value.reason == "malformed"


def test_largest_integer_is_valid() -> None:
    assert Schema(whole(0)).decode(msgspec.msgpack.encode(MAX_INTEGER)) == MAX_INTEGER


@pytest.mark.parametrize("length", [0, 31, 32, 255, 256, 65535, 65536])
def test_text_is_told_from_bytes_by_its_first_byte(length: int) -> None:
    assert is_text(msgspec.msgpack.encode("x" * length))
    assert not is_text(msgspec.msgpack.encode(b"x" * length))


@pytest.mark.parametrize("value", [None, 7, -7, 1.5, [], ["x"], {}, True])
def test_other_values_are_no_text(value: object) -> None:
    assert not is_text(msgspec.msgpack.encode(value))
    assert not is_text(b"")

"""Decode msgpack messages of untrusted peers by a schema, with bounded cost.

A schema is a type of msgspec: fixed tuples, lists with a maximum length, texts, bytes and integers
with bounds. Every value is checked while it is read, and the first invalid one ends the decoding.
A decoder that checks a message only after building it would build whatever a peer sends: 1.4 KB on
the wire decompress to 8 MiB of nested empty lists, and those become 560 MB of objects.
"""

from types import GenericAlias
from typing import Annotated, Any

import msgspec

from worker.errors import BadRecord

MAX_INTEGER = 2**63 - 1

# Schemas are made at run time, which type checkers do not allow for Annotated itself.
_Annotated: Any = Annotated


class Schema:
    """Decodes messages of one type, such as `record(whole(0), str)`."""

    def __init__(self, message_type: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)

    def decode(self, data: bytes) -> Any:
        """Return the message. Raises BadRecord ("malformed") for anything but one such message."""
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRecord(
                "malformed", f"{len(data)} bytes that are not a valid message: {error}"
            ) from None


def record(*fields: Any) -> Any:
    """Return the type of lists with exactly these items, decoded as tuples."""
    return GenericAlias(tuple, fields)


def at_most(item: Any, max_length: int) -> Any:
    """Return the type of lists of up to `max_length` items of one type."""
    return _Annotated[GenericAlias(list, (item,)), msgspec.Meta(max_length=max_length)]


def binary(max_bytes: int) -> Any:
    """Return the type of up to `max_bytes` bytes."""
    return _Annotated[bytes, msgspec.Meta(max_length=max_bytes)]


def whole(low: int, high: int = MAX_INTEGER) -> Any:
    """Return the type of integers from `low` to `high`."""
    return _Annotated[int, msgspec.Meta(ge=low, le=high)]


def is_text(data: bytes) -> bool:
    """Return whether a message begins like a text; msgspec does not distinguish text from bytes."""
    return bool(data) and (0xA0 <= data[0] <= 0xBF or 0xD9 <= data[0] <= 0xDB)

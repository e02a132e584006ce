"""msgpack, read value by value as a schema wants them: lists are entered, never built.

A decoder that builds a message before it looks at it builds what untrusted peers like: 1.4 KB on
the wire become 8 MiB of empty lists inside lists, and those 560 MB of objects. Here a message costs
what its schema has, and the first value that is not of it is the last one that is read.
"""

import math
from typing import Any

import msgpack

from worker.errors import BadRecord

MAX_INTEGER = 2**63 - 1
_LONGEST_LIST = 2**32 - 1  # that msgpack can write


class Fields:
    """The values of one message, in their order.

    Every accessor raises BadRecord if the next value is missing or has the wrong type.
    """

    def __init__(self, data: bytes, max_extension_bytes: int = 0) -> None:
        self._num_bytes = len(data)
        # No value is a list or a map with anything in it; text and bytes can't be longer than
        # `data`.
        self._values = msgpack.Unpacker(
            raw=False,
            max_array_len=0,
            max_map_len=0,
            max_ext_len=max_extension_bytes,
            max_buffer_size=max(1, len(data)),  # 0 would be no limit
        )
        self._values.feed(data)

    def enter(self, at_least: int = 0, at_most: int = _LONGEST_LIST) -> range:
        """The next value is a list: its items are the next ones. As a range, to go through them."""
        try:
            length = self._values.read_array_header()
        except (ValueError, msgpack.UnpackException):
            raise BadRecord("malformed", "expected a list") from None
        if not at_least <= length <= at_most:
            expected = at_least if at_least == at_most else f"{at_least} to {at_most}"
            raise BadRecord("malformed", f"expected a list of {expected}, not of {length}")
        return range(length)

    def value(self) -> Any:
        """The next value, whatever it is; if that is a list or a map, it is empty."""
        try:
            return self._values.unpack()
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            raise BadRecord(
                "malformed", f"{self._num_bytes} bytes that are no message of ours"
            ) from None

    def integer(self, low: int = 0, high: int = MAX_INTEGER) -> int:
        value = self.value()
        if type(value) is not int or not low <= value <= high:
            raise BadRecord("malformed", f"expected an integer from {low} to {high}")
        return value

    def number(self) -> float:
        """A float; no integer, and neither infinite nor NaN."""
        value = self.value()
        if not isinstance(value, float) or not math.isfinite(value):
            raise BadRecord("malformed", "expected a number")
        return value

    def binary(self, max_bytes: int) -> bytes:
        value = self.value()
        if not isinstance(value, bytes) or len(value) > max_bytes:
            raise BadRecord("malformed", f"expected at most {max_bytes} bytes")
        return value

    def text(self) -> str:
        value = self.value()
        if not isinstance(value, str):
            raise BadRecord("malformed", "expected text")
        return value

    def finish(self) -> None:
        """Nothing may be left."""
        if self._values.tell() != self._num_bytes:
            raise BadRecord(
                "malformed", f"message of {self._num_bytes} bytes goes on after its end"
            )

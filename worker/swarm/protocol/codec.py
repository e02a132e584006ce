"""A typed msgpack decoder: values are read one by one as a schema expects them.

A decoder that builds a message before it is checked builds whatever an untrusted peer sends: 1.4 KB
on the wire become 8 MiB of nested empty lists, and those become 560 MB of objects. Here the cost of
a message is bounded by its schema, and decoding ends at the first invalid value.
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
        """Enter a list, whose items are the next values; return the range of their indices."""
        try:
            length = self._values.read_array_header()
        except (ValueError, msgpack.UnpackException):
            raise BadRecord("malformed", "expected a list") from None
        if not at_least <= length <= at_most:
            expected = at_least if at_least == at_most else f"{at_least} to {at_most}"
            raise BadRecord("malformed", f"expected a list of {expected}, not of {length}")
        return range(length)

    def value(self) -> Any:
        """Return the next value, whatever it is; a list or a map is valid only if it is empty."""
        try:
            return self._values.unpack()
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            raise BadRecord(
                "malformed", f"{self._num_bytes} bytes that are not a valid message"
            ) from None

    def integer(self, low: int = 0, high: int = MAX_INTEGER) -> int:
        value = self.value()
        if type(value) is not int or not low <= value <= high:
            raise BadRecord("malformed", f"expected an integer from {low} to {high}")
        return value

    def number(self) -> float:
        """Return a float that is finite; integers are refused."""
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
        """Raise BadRecord unless all bytes were read."""
        if self._values.tell() != self._num_bytes:
            raise BadRecord(
                "malformed", f"message of {self._num_bytes} bytes has data after its end"
            )

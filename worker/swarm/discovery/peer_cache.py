"""The part of the network's state that survives a restart: port, bootnodes and peers' addresses.

A node that has lost it only takes longer to find its peers.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from worker.runtime.files import write_whole

log = logging.getLogger(__name__)

MAX_ADDRESSES_CACHED = 128
MAX_FILE_BYTES = 256 << 10
"""Limit in bytes, far more than is written: 128 peers and 128 bootnodes of 256 characters each."""


@dataclass(frozen=True)
class Cache:
    """`port`: our port, 0: none yet. The other fields are full addresses (with /p2p/)."""

    port: int = 0
    peers: tuple[str, ...] = ()
    bootnodes: tuple[str, ...] = ()


def load(path: Path) -> Cache:
    """Return the cache at `path`; empty if there is none or if it is corrupt, which is logged."""
    try:
        with path.open("rb") as file:
            # A longer file is cut and so not valid JSON. Unlike json.loads, from_json limits how
            # deep lists are nested, whatever recursion limit a library has set.
            data = from_json(file.read(MAX_FILE_BYTES))
        port = int(data["port"])
        peers, bootnodes = _texts(data["peers"]), _texts(data.get("bootnodes", []))
    except FileNotFoundError:
        return Cache()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        log.warning("peer cache ignored path=%s reason=%r", path, error)
        return Cache()
    return Cache(port if 0 <= port <= 65535 else 0, peers, bootnodes)


def save(path: Path, cache: Cache) -> None:
    """Replace the cache atomically. Raises ResourceError."""
    content = {"version": 1, "port": cache.port, "peers": cache.peers, "bootnodes": cache.bootnodes}
    write_whole(path, json.dumps(content), durable=False)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values[:MAX_ADDRESSES_CACHED])

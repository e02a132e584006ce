"""Prune old blocks and transactions of the embedded chain, so that it can run for months.

The contract's state is kept forever. Receipts, logs and call data (with the digests that audits
read) of blocks older than `anvil.history_blocks` are dropped. anvil itself drops old transactions,
but never a block, and every dump contains everything. So its state file is pruned before each
start, dumps of a large one are less frequent, and a chain that has grown a lot is restarted.
"""

import json
import logging
import math
import time
from pathlib import Path

from worker.errors import ResourceError
from worker.runtime.files import write_whole

log = logging.getLogger(__name__)

_MEGABYTE = 1_000_000
_DUMP_SECONDS_PER_MEGABYTE = 0.03
"""Processor time of a dump per MB; measured: 1.8 s for 60 MB."""
_SHARE = 0.1
"""Share of a core that dumps may use."""
_LEAST_STATES, _MOST_STATES, _STATES_MEGABYTES = 4, 64, 256.0
_GROWTH_FACTOR, _LEAST_GROWTH_MEGABYTES = 2.0, 32.0
_HOUR = 3600.0
_WORRY_MEGABYTES = 32.0
"""Growth in MB per hour that is logged; sixty nodes with a round per minute cause 20."""


def megabytes(file: Path) -> float:
    """Return the file's size; 0 if it is missing."""
    try:
        return file.stat().st_size / _MEGABYTE
    except FileNotFoundError:
        return 0.0


def dump_seconds(state_file: Path) -> int:
    """Return the interval between dumps of a state of this size; a killed chain may lose that."""
    return max(1, math.ceil(megabytes(state_file) * _DUMP_SECONDS_PER_MEGABYTE / _SHARE))


def kept_states(state_file: Path) -> int:
    """Return the number of past states that anvil keeps, each a copy of the contract's state.

    All reads are of the latest state, but that becomes a past state if a block is mined during the
    read; with a small state blocks are mined faster.
    """
    number = int(_STATES_MEGABYTES / (1.0 + megabytes(state_file)))
    return max(_LEAST_STATES, min(_MOST_STATES, number))


def has_outgrown(state_file: Path, megabytes_before: float) -> bool:
    """Return whether the state has grown so much since the start that it should be pruned."""
    return megabytes(state_file) > _GROWTH_FACTOR * megabytes_before + _LEAST_GROWTH_MEGABYTES


class Growth:
    """Log when the state file grows faster than a swarm should make it."""

    def __init__(self, state_file: Path) -> None:
        self._file = state_file
        self._since, self._before = time.monotonic(), megabytes(state_file)

    def look(self) -> None:
        now, size = time.monotonic(), megabytes(self._file)
        if size - self._before > _WORRY_MEGABYTES:
            log.warning(
                "the chain grows fast: state file %s from %.0f to %.0f MB in %.0f minutes; see the"
                " account service's log for what is sent",
                self._file,
                self._before,
                size,
                (now - self._since) / 60,
            )
        elif now - self._since < _HOUR:
            return
        self._since, self._before = now, size


def cut(state_file: Path, num_blocks: int) -> float:
    """Keep the newest blocks and the first one, with their transactions.

    Returns the file's new size in MB. A file in another form than our anvil's stays as it is, which
    is logged. Raises ResourceError if it can't be read or written.
    """
    try:
        text = state_file.read_text()
    except FileNotFoundError:
        return 0.0
    except (OSError, UnicodeDecodeError) as error:
        raise ResourceError(f"{state_file} (anvil.state_file): can't be read: {error}") from None
    try:
        shorter = _without_old(text, num_blocks)
    except (ValueError, KeyError, TypeError) as error:
        log.error(
            "history not pruned: the state file is not in our anvil's form file=%s error=%r",
            state_file,
            error,
        )
        return megabytes(state_file)
    if len(shorter) < len(text):
        write_whole(state_file, shorter)
        log.info(
            "history pruned state=%s from_mb=%.1f to_mb=%.1f",
            state_file,
            len(text) / 1e6,
            len(shorter) / 1e6,
        )
    return megabytes(state_file)


def _without_old(text: str, num_blocks: int) -> str:
    """Return the state without old blocks and transactions.

    The accounts, which are most of a large file, stay text: parsed as JSON they would take ten
    times the memory.
    """
    start = text.index(_KEY_OF_BLOCKS) + len(_KEY_OF_BLOCKS)
    blocks, end = _decoder.raw_decode(text, start)
    numbers = [int(block["header"]["number"], 16) for block in blocks]
    oldest = max(numbers, default=0) - num_blocks + 1
    if all(number >= oldest or number == 0 for number in numbers):
        return text
    numbered = zip(numbers, blocks, strict=True)
    kept = [block for number, block in numbered if number >= oldest or number == 0]
    transactions_start = text.index(_KEY_OF_TRANSACTIONS, end) + len(_KEY_OF_TRANSACTIONS)
    transactions, transactions_end = _decoder.raw_decode(text, transactions_start)
    kept_transactions = [each for each in transactions if each["block_number"] >= oldest]
    return "".join(
        (
            text[:start],
            _encoder.encode(kept),
            text[end:transactions_start],
            _encoder.encode(kept_transactions),
            text[transactions_end:],
        )
    )


_KEY_OF_BLOCKS, _KEY_OF_TRANSACTIONS = ',"blocks":', ',"transactions":'
_decoder = json.JSONDecoder()
_encoder = json.JSONEncoder(separators=(",", ":"))

"""A word about what takes longer than a moment: a silent program looks like one that hangs."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

FIRST_SECONDS = 2.0
EVERY_SECONDS = 15.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Report on standard error, after two seconds and then every fifteen, that this is under way,
    and for how long."""
    ended = threading.Event()
    began = time.monotonic()

    def report() -> None:
        pause = FIRST_SECONDS
        while not ended.wait(pause):
            print(f"{what} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            pause = EVERY_SECONDS

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()

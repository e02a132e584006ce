"""Progress messages for long operations, so that they do not look hung."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

FIRST_SECONDS = 2.0
EVERY_SECONDS = 15.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Print `what` and the elapsed time to standard error after 2 s, then every 15 s."""
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

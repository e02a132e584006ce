"""What the long-running roles share: an orderly end on a signal."""

import signal
import sys
from types import FrameType


def exit_on_signals() -> None:
    """Make SIGTERM and SIGINT end the process with code 0, through every `finally` on the way."""

    def leave(signum: int, frame: FrameType | None) -> None:
        # A second signal must not break the orderly end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)

"""Log once when something starts to fail, and once when it works again."""

import logging


class Outage:
    """The state of a dependency (a chain, a disk) that may fail.

    Nothing is logged between the start and the end of an outage.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.is_on = False

    def begin(self, message: str, *arguments: object) -> None:
        """Record a failure; log `message` as a warning if it is the first."""
        if not self.is_on:
            self._log.warning(message, *arguments, stacklevel=2)
        self.is_on = True

    def end(self, message: str, *arguments: object) -> None:
        """Record a success; log `message` if it is the first after a failure."""
        if self.is_on:
            self._log.info(message, *arguments, stacklevel=2)
        self.is_on = False

"""Set up logging, with one line format for all roles.

A line looks like `2026-11-23T07:30:12.345Z INFO worker.node round finished round=12
reward_mean=0.41`. Handlers are set up only here, once, by the command line. Text from untrusted
peers reaches the log through `%s` arguments; control characters and terminal escapes in it are
escaped.
"""

import json
import logging
import re
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

MAX_FILE_BYTES = 10_000_000
NUM_OLD_FILES = 5


HIDDEN = "[redacted]"
_IN_ADDRESSES = (
    # Userinfo and query of an address, and its path beyond a provider's API key.
    # A password may have an @ in it: userinfo ends at the last one.
    (re.compile(r"(\w+://)[^/\s\"']+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(https?://[^\s?\"']+)\?[^\s\"']+"), rf"\1?{HIDDEN}"),
    (re.compile(r"(https?://[^\s\"']*/)[A-Za-z0-9_-]{24,}"), rf"\1{HIDDEN}"),
)


_PASSWORD = re.compile(r"\w+://[^/\s\"':@]*:([^/\s\"']+)@")
_SHORTEST_HIDDEN = 12
"""Shorter secrets are not redacted: they occur in too many words."""
_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Redact `secret` from now on in everything that this process logs or reports."""
    if len(secret) >= _SHORTEST_HIDDEN:
        _hidden.add(secret)


def hide_passwords(text: str) -> None:
    """Redact the passwords of all URLs in `text` from now on, even where they occur alone."""
    for password in _PASSWORD.findall(text):
        hide(password)


def discreet(text: str) -> str:
    """Return `text` with hidden secrets, and credentials in URLs, redacted.

    More people may read a journal than a secret, and a server may quote a request in its error.
    """
    # The longest first: if a part of a secret were replaced before it, the rest would be shown.
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        for pattern, replacement in _IN_ADDRESSES:
            text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    r"""Return `text` with every control character escaped, line feed and ESC included.

    They are written as \xNN or \uNNNN.
    """
    if text.isprintable():
        return text
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(escaped)


class _TextFormatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Format the traceback, indented.

        It may quote untrusted peers at its end, which must not look like a line of the log.
        """
        return "\n".join(
            f"    {printable(line)}" for line in discreet(super().formatException(ei)).split("\n")
        )

    def formatTime(  # noqa: N802
        self,
        record: logging.LogRecord,
        datefmt: str | None = None,
    ) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{seconds}.{int(record.msecs):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{self.formatTime(record)} {record.levelname} {record.name}"
            f" {printable(discreet(record.getMessage()))}"
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(_TextFormatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": discreet(record.getMessage()),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def setup(
    level: str = "INFO",
    format: Literal["text", "json"] = "text",
    file: Path | None = None,
) -> None:
    """Send all logging to standard error, and to `file` if given.

    journald or the demo's log file picks up standard error. `file` is kept below MAX_FILE_BYTES;
    NUM_OLD_FILES older ones stay next to it. Raises OSError if it can't be made.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        handlers.append(
            RotatingFileHandler(file, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES)
        )
    for handler in handlers:
        handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(True)
    for chatty in (
        "urllib3",
        "asyncio",
        "filelock",
        "matplotlib",
        "web3",
        "httpx",
        "aiohttp.access",
    ):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))

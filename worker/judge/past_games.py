"""The games that ended, in a file of bounded length and in memory."""

import json
from pathlib import Path
from typing import Any

from worker.errors import WorkerError
from worker.runtime.files import write_whole

FILE = "games.jsonl"
"""Name of the file in the judge's folder."""
MAX_GAMES = 1000
"""Number of games to keep; the oldest are dropped."""


class PastGames:
    """The games in `file`, one JSON object per line. Raises WorkerError for a damaged file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._games = read(file)

    def newest(self, count: int) -> list[dict[str, Any]]:
        """Return the last `count` games, newest first."""
        return self._games[-count:][::-1]

    def add(self, game: dict[str, Any]) -> None:
        """Add a game that ended, or replace it if it is there already, as after a crash."""
        others = [other for other in self._games if other["game"] != game["game"]]
        games = [*others, game][-MAX_GAMES:]
        write_whole(self._file, "".join(json.dumps(each) + "\n" for each in games))
        self._games = games


def read(file: Path) -> list[dict[str, Any]]:
    """Return the games, oldest first; empty if there is no file. Raises WorkerError."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    try:
        return [json.loads(line) for line in lines][-MAX_GAMES:]
    except ValueError as error:
        raise foreign(file, str(error)) from None


def foreign(file: Path, reason: str) -> WorkerError:
    """Return the error for a file in the judge's folder that a judge can't have written."""
    return WorkerError(f"{file}: not what a judge writes ({reason}); move it away")

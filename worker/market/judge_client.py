"""Read the judge's clue. The judge is not trusted: its answer is limited and checked."""

from typing import Annotated, TypeVar

import requests
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.chain import http
from worker.errors import BadAnswer, ChainUnreachable
from worker.log import printable

_SECONDS = 5.0
_MAX_CLUE_BYTES = 256 * 1024
_MAX_GAMES_BYTES = 16 << 20
_MAX_ROUNDS = 10_000
_Answer = TypeVar("_Answer", bound=BaseModel)

Choice = Annotated[str, Field(min_length=1, max_length=1000)]


class Clue(BaseModel):
    """The clue on which bets are taken; `game_id` -1: there is none."""

    model_config = ConfigDict(frozen=True, strict=True)

    game_id: Annotated[int, Field(ge=-1, lt=2**63)]
    clue_id: Annotated[int, Field(ge=-1, lt=2**31)]
    rounds_remaining: Annotated[int, Field(ge=-1, le=_MAX_ROUNDS)] = -1
    clue: Annotated[str, Field(max_length=20_000)] = ""
    choices: Annotated[list[Choice], Field(max_length=64)] = []
    family: Annotated[str, Field(max_length=100)] | None = None

    @property
    def is_open(self) -> bool:
        """Return whether there is something to bet on."""
        return self.game_id >= 0 and self.clue_id >= 0 and len(self.choices) >= 2


class PastGame(BaseModel):
    """A game that ended, as hivewright's judge reports it."""

    model_config = ConfigDict(frozen=True)

    game: Annotated[int, Field(ge=0, lt=2**63)]
    clues: Annotated[
        tuple[Annotated[str, Field(max_length=20_000)], ...], Field(min_length=1, max_length=64)
    ]
    choices: Annotated[tuple[Choice, ...], Field(max_length=64)]
    family: Annotated[str, Field(max_length=100)] | None = None


class _PastGames(BaseModel):
    games: Annotated[list[PastGame], Field(max_length=1000)]


class JudgeClient:
    """Client of the judge at `url`.

    Every method raises ChainUnreachable if there is no answer, BadAnswer for an invalid answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = http.open_session()

    def clue(self) -> Clue:
        """Return the clue on which bets are taken."""
        return self._get("current_clue/", Clue, "a clue", _MAX_CLUE_BYTES)

    def past_games(self) -> list[PastGame]:
        """Return the last games that ended; only hivewright's judge has this call."""
        return self._get("api/games", _PastGames, "the past games", _MAX_GAMES_BYTES).games

    def _get(self, path: str, model: type[_Answer], what: str, max_bytes: int) -> _Answer:
        url = f"{self.url}/{path}"
        try:
            answer = self._session.get(url, timeout=_SECONDS, allow_redirects=False)
        except requests.RequestException as error:
            raise ChainUnreachable(f"{url}: no answer ({type(error).__name__})") from None
        if answer.status_code != 200:
            raise ChainUnreachable(f"{url}: HTTP {answer.status_code}; expected {what}")
        if len(answer.content) > max_bytes:
            size = len(answer.content)
            raise BadAnswer(f"{url}: an answer of {size} bytes; expected {what}")
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "/".join(str(part) for part in first["loc"])
            raise BadAnswer(printable(f"{url}: {where}: {first['msg']}; expected {what}")) from None

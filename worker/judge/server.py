"""The judge (`hivewright judge`): an HTTP service like RL Swarm's judge, and the games behind it.

It starts and keeps running without a chain; no game accepts bets until there is one.
"""

import asyncio
import logging
from typing import Annotated, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker import environments
from worker.chain.coordinator import Coordinator
from worker.chain.deployment import resolve
from worker.chain.embedded.anvil import load_key
from worker.chain.market import Market
from worker.chain.quotas import Quota
from worker.errors import ChainError, ChainUnreachable, SettingsError
from worker.judge import problems
from worker.judge.conductor import NO_CLUE, Conductor
from worker.judge.questions import MAX_ANSWER, Questions
from worker.log import printable
from worker.runtime import systemd, webguard, webservice
from worker.runtime.outage import Outage
from worker.settings import Settings

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024
QUESTIONS_PER_SECOND = 1.0
QUESTIONS_BURST = 60.0
"""Limits of evaluation questions per address, so that one can't displace all open questions."""
_Body = TypeVar("_Body", bound=BaseModel)


class QuestionRequest(BaseModel):
    """A node that asks for an evaluation question. The fields are for the log."""

    model_config = ConfigDict(protected_namespaces=())

    user_id: Annotated[str, Field(max_length=256)]
    round_number: Annotated[int, Field(ge=0)]
    model_name: Annotated[str, Field(max_length=256)]


class AnswerRequest(BaseModel):
    """The answer to the question of a session."""

    session_id: Annotated[str, Field(max_length=64)]
    round_number: Annotated[int, Field(ge=0)]
    user_answer: Annotated[str, Field(max_length=MAX_ANSWER)]


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; the URL is in `<judge.state_dir>/address` when ready.

    Raises ResourceError if the port is in use, SettingsError if there is no chain or a file in the
    settings is invalid, ChainError if the judge's key is missing.
    """
    if settings.chain.rpc_url is None and settings.chain.deployment_file is None:
        raise SettingsError(
            "chain.rpc_url and chain.deployment_file: both empty; the judge needs a chain of its"
            " own; set one"
        )
    webservice.run("judge", settings.judge, lambda: Service(settings))


class Service:
    """The HTTP calls. Tasks are made and scored, and the chain is read, in threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._account = load_key(settings.judge.key_file, "judge")
        self._environment = environments.load(settings.environment)
        self._problems = problems.source(settings.judge, lambda: self._environment)
        self._questions = Questions(self._environment)
        self._quota = Quota(QUESTIONS_PER_SECOND, QUESTIONS_BURST)
        self._conductor: Conductor | None = None
        self._outage = Outage(log)

    def application(self) -> web.Application:
        application = webservice.new_application(_MAX_BODY_BYTES)
        application.router.add_get("/current_clue/", self.current_clue)
        application.router.add_post("/request-question/", self.request_question)
        application.router.add_post("/submit-answer/", self.submit_answer)
        application.router.add_get("/api/games", self.games)
        return application

    def started(self, url: str) -> None:
        log.info("judge up url=%s account=%s", url, self._account.address)

    async def tend(self) -> None:
        """Run the games, forever."""
        while True:
            try:
                await asyncio.to_thread(self._step)
                self._outage.end("chain answers again")
                systemd.progress("runs games")
            except (ChainUnreachable, ChainError) as error:
                self._outage.begin("game waits error=%s", error)
                systemd.progress("game waits")
            await asyncio.sleep(self._settings.chain.poll_seconds)

    def _step(self) -> None:
        if self._conductor is None:
            market = Market(Coordinator(self._settings.chain), self._market_address())
            market.client.check()
            self._conductor = Conductor(self._settings.judge, market, self._account, self._problems)
        self._conductor.step()

    def _market_address(self) -> str:
        address = self._settings.market.contract or resolve(self._settings.chain).market
        if address is None:
            raise ChainError(
                "no prediction market: market.contract is not set, and chain.deployment_file names"
                " none; run `hivewright chain deploy` (with market.enabled on other chains)"
            )
        return address

    # ---- calls

    async def current_clue(
        self,
        request: web.Request,
    ) -> web.Response:
        clue = NO_CLUE if self._conductor is None else self._conductor.clue()
        return web.json_response(clue)

    async def request_question(
        self,
        request: web.Request,
    ) -> web.Response:
        asked = await _parsed(request, QuestionRequest)
        if not self._quota.take(webguard.source_of(str(request.remote))):
            raise web.HTTPTooManyRequests(reason="too many questions; ask again in a minute")
        session, question = await asyncio.to_thread(self._questions.ask)
        log.info(
            "question asked user=%s round=%d model=%s",
            asked.user_id,
            asked.round_number,
            asked.model_name,
        )
        return web.json_response({"session_id": session, "question": question})

    async def submit_answer(
        self,
        request: web.Request,
    ) -> web.Response:
        answer = await _parsed(request, AnswerRequest)
        score = await asyncio.to_thread(
            self._questions.score, answer.session_id, answer.user_answer
        )
        if score is None:
            return web.json_response(
                {"error": "session_id: not open; request a question"}, status=404
            )
        return web.json_response({"score": score})

    async def games(
        self,
        request: web.Request,
    ) -> web.Response:
        """Answer the games that ended, newest first; RL Swarm's judge has no such call."""
        past = [] if self._conductor is None else self._conductor.past_games(_MAX_GAMES)
        return web.json_response({"games": past})


_MAX_GAMES = 100


async def _parsed(
    request: web.Request,
    model: type[_Body],
) -> _Body:
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(str(part) for part in first["loc"]) or "body"
        reason = printable(f"{where}: {first['msg']}")[:200]
        raise web.HTTPBadRequest(reason=reason) from None

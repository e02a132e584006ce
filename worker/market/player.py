"""Play the prediction market: a thread that talks to judge and chain, and the model's opinion.

The thread reads the clue and passes it to the round loop, because only that may use the model,
between rounds (`think`). Then the thread decides on a bet. Judge and chain are not trusted; at
worst they cost the bet.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from worker.chain.account_client import Account, AccountClient
from worker.chain.client import Unanswered
from worker.chain.coordinator import Coordinator
from worker.chain.market import Market
from worker.errors import ContractRefused, NotScored, WorkerError
from worker.log import printable
from worker.market import policies
from worker.market.bets import REPLACED, Bets, is_replaced, line_of
from worker.market.journal import Journal, Row
from worker.market.judge_client import Clue, JudgeClient
from worker.market.policies import Bet, Odds
from worker.market.record import Record
from worker.runtime.outage import Outage
from worker.settings import Market as MarketSettings

log = logging.getLogger(__name__)

_LOOK_AGAIN_SECONDS = 60.0
_MAX_ANSWER_SHOWN = 80


class Opinion(Protocol):
    """The model: log-probabilities of the choices, in at most about `seconds`. Raises NotScored."""

    def logprobs(self, question: str, choices: list[str], seconds: float) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """The addresses of the market: that of its contract, and the judge's URL."""

    contract: str
    judge_url: str


def locate(market: MarketSettings, account: Account, client: Coordinator) -> Place | None:
    """Return the swarm's market; None if it has none.

    The settings take precedence over the deployment file, and that over the account service.
    """
    contract = market.contract or client.deployment.market
    judge_url = market.judge_url
    if isinstance(account, AccountClient) and not (contract and judge_url):
        swarm = account.swarm()
        contract, judge_url = contract or swarm.market, judge_url or swarm.judge_url
    return Place(contract, judge_url) if contract and judge_url else None


class Player:
    """A node's bets, in a thread from `start` to `close`."""

    def __init__(
        self,
        settings: MarketSettings,
        peer_id: str,
        client: Coordinator,
        account: Account,
        journal: Journal,
        record_file: Path,
    ) -> None:
        self._settings = settings
        self._peer_id = peer_id
        self._client = client
        self._account = account
        self.journal = journal
        self._record = Record(record_file, journal)
        self._market: Market | None = None
        self._bets: Bets | None = None
        self._judge: JudgeClient | None = None
        self._is_none_logged = False
        self._outage = Outage(log)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # A clue with its row: from the thread to the round loop, and back with the beliefs.
        self._asked: tuple[Clue, Row] | None = None
        self._seen: Clue | None = None
        self._opinion: tuple[Clue, Row] | None = None
        self._thread = threading.Thread(target=self._run, name="market", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; wait for a request in progress, up to its time limit."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(10.0)

    def flush(self, seconds: float) -> None:
        """Wait until every bet is settled and claimed, or the time is up."""
        deadline = time.monotonic() + seconds
        while self.journal.num_open() and time.monotonic() < deadline:
            if self._closing.wait(min(self._settings.poll_seconds, 0.5)):
                return

    def status(self) -> dict[str, float]:
        """Return the number of bets by state; `brier`: mean score of the probabilities rated."""
        count, mean = self.journal.mean_brier()
        found: dict[str, float] = dict(self.journal.counts())
        if mean is not None:
            found |= {"rated": count, "brier": round(mean, 4)}
        return found

    def calibration(self) -> dict[str, float]:
        """Return the mean Brier score of the rated probabilities, by task family."""
        return self.journal.brier_by_family()

    def think(self, make_opinion: Callable[[], Opinion]) -> None:
        """Ask the model about a new clue, if there is one; called by the round loop.

        It takes at most about `market.seconds_per_round`, which is also the longest delay of a
        round that opens meanwhile.
        """
        with self._lock:
            asked = self._asked
        if asked is None:
            return
        clue, row = asked
        # Before the model is asked: if that kills the worker, it is not asked again at the restart.
        self.journal.add(row)
        seconds = self._settings.seconds_per_round
        try:
            found = make_opinion().logprobs(clue.clue, clue.choices, seconds)
        except NotScored as error:
            row = replace(row, reason=str(error))
        else:
            row = replace(row, beliefs=tuple(policies.probabilities(found)), reason=None)
        with self._lock:
            self._opinion = clue, row
            if self._asked is asked:
                self._asked = None

    # ---- the thread

    def _run(self) -> None:
        while not self._closing.is_set():
            self._try_step()
            self._closing.wait(self._settings.poll_seconds)

    def _try_step(self) -> None:
        """Locate the market if necessary, and do one step. An outage is logged."""
        try:
            if not self._find():
                return
            self.step()
        except WorkerError as error:
            self._outage.begin("prediction market waits error=%s", error)
            return
        if self._outage.is_on and self._bets is not None:
            self._bets.doubt()
        self._outage.end("prediction market answers again")

    def _find(self) -> bool:
        """Locate market and judge, once; return False if the swarm has none."""
        if self._market is not None:
            return True
        place = locate(self._settings, self._account, self._client)
        if place is None:
            if not self._is_none_logged:
                log.info("prediction market: this swarm has none")
            self._is_none_logged = True
            self._closing.wait(_LOOK_AGAIN_SECONDS)
            return False
        self._market = Market(self._client, place.contract)
        self._bets = Bets(self._market, self._account, self._peer_id, self.journal, self._record)
        self._judge = JudgeClient(place.judge_url)
        log.info(
            "taking part in the prediction market contract=%s judge=%s policy=%s; market.enabled:"
            " false opts out",
            place.contract,
            place.judge_url,
            self._settings.policy,
        )
        return True

    def step(self) -> None:
        """Check open bets, then the judge's clue. After an error the journal is unchanged."""
        market, judge, bets = self._market, self._judge, self._bets
        if market is None or judge is None or bets is None:
            return
        bets.follow()
        self._take_opinion(market, bets)
        clue = judge.clue()
        if not clue.is_open or clue == self._seen:
            return
        reason = self._obstacle(market, clue)
        if reason is not None:  # the judge is ahead of the chain for a moment, or its clue is wrong
            log.debug("clue ignored game=%d round=%d %s", clue.game_id, clue.clue_id, reason)
            return
        creation = market.creation(clue.game_id) or ""
        if not self.journal.has(market.address, clue.game_id, clue.clue_id, creation):
            self._ask(market, clue, creation)
        self._seen = clue

    def _ask(self, market: Market, clue: Clue, creation: str) -> None:
        """Pass a clue to the round loop."""
        now = time.time()
        row = Row(
            market.address,
            clue.game_id,
            clue.clue_id,
            market.client.block_number(),
            choice=0,
            amount=0,
            beliefs=(),
            state="skipped",
            changed_at=now,
            reason="the worker ended before its model had scored the choices",
            family=clue.family,
            creation=creation,
            asked_at=now,
        )
        with self._lock:
            self._asked = clue, row

    def _take_opinion(self, market: Market, bets: Bets) -> None:
        """Record the decision on the clue that the model was asked about, and send the bet."""
        with self._lock:
            opinion = self._opinion
        if opinion is None:
            return
        clue, row = opinion
        row = self._decide(market, clue, row)
        is_bet = row.state == "planned"
        self.journal.decide(row, None if is_bet else line_of(row, f"no bet: {row.reason}"))
        with self._lock:
            self._opinion = None
        if is_bet:
            bets.send(row)
        else:
            self._record.write()

    def _decide(self, market: Market, clue: Clue, row: Row) -> Row:
        """Return the row with the bet, or with the reason why there is none."""
        bet, reason = Bet(0, 0), row.reason or self._obstacle(market, clue)
        if reason is None and is_replaced(market, row):
            reason = REPLACED
        if reason is None:
            try:
                bet = self._bet(market, clue, row)
                reason = None if bet.amount else "the policy makes no bet"
            except (ContractRefused, Unanswered) as error:
                reason = f"the contract does not tell what a bet would pay: {error}"
        return replace(
            row,
            choice=bet.choice,
            amount=bet.amount,
            state="planned" if reason is None else "skipped",
            changed_at=time.time(),
            reason=reason,
            answer=printable(clue.choices[bet.choice])[:_MAX_ANSWER_SHOWN],
        )

    def _obstacle(self, market: Market, clue: Clue) -> str | None:
        """Return why not to bet: contract and judge disagree about the game. None: they agree."""
        try:
            num_choices = int(market.read("choiceCount", clue.game_id))
            round = market.current_round(clue.game_id)
        except ContractRefused as refusal:
            return f"the contract has no such game ({refusal.name or 'refused'})"
        if num_choices != len(clue.choices):
            return f"the judge gives {len(clue.choices)} choices, the contract {num_choices}"
        if round != clue.clue_id:
            return f"the contract is in round {round}"
        return None

    def _bet(self, market: Market, clue: Clue, row: Row) -> Bet:
        balance = market.balance(self._peer_id)
        if self._settings.policy == "even":
            return policies.even(row.beliefs, balance, clue.rounds_remaining)
        choice = policies.likeliest(row.beliefs)
        offers = [
            (amount, market.shares_for(row.game, row.round, choice, amount))
            for amount in policies.amounts(balance)
        ]
        fraction = self._settings.kelly_fraction
        return policies.kelly(row.beliefs, self._odds(market, row), offers, balance, fraction)

    def _odds(self, market: Market, row: Row) -> Odds:
        choices = range(len(row.beliefs))
        earlier = [
            other.amount
            for other in self.journal.open_rows(market.address)
            if (other.game, other.creation) == (row.game, row.creation)
        ]
        return Odds(
            pot=market.total_bets(row.game),
            stake=sum(earlier),
            supplies=tuple(market.supply(row.game, choice) for choice in choices),
            own=tuple(market.shares_of(row.game, choice, self._peer_id) for choice in choices),
            opening=market.paid_opening(),
        )

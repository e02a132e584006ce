"""Play the prediction market: a thread that talks to judge and chain, and the model's opinion.

The thread reads the clue and hands it to the round loop, which alone may use the model, between
rounds (`think`). A bet is in the journal before it is sent, and whether it counts is read from the
contract: on our contract, which takes one bet for each clue, it is sent until it is there; on a
foreign one it is sent once. Whatever judge and chain do costs at most the bet.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from worker.chain.account_client import Account, AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.market import GameStatus, Market
from worker.errors import ContractRefused, NotScored, WorkerError
from worker.log import printable
from worker.market import policies
from worker.market.journal import Journal, Row
from worker.market.judge_client import Clue, JudgeClient
from worker.market.policies import Bet
from worker.runtime.outage import Outage
from worker.settings import Market as MarketSettings

log = logging.getLogger(__name__)

TOKEN = 10**18
RESEND_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 60.0
_FORGET_SECONDS = 600.0
"""Time until a bet is given up whose game the chain does not know."""
_MAX_CHOICES_SHOWN = 80
_REPLACED = "the chain was restored from before the game"


class Opinion(Protocol):
    """The model: log-probabilities of the choices, in at most about `seconds`. Raises NotScored."""

    def logprobs(self, question: str, choices: list[str], seconds: float) -> list[float]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where the market is: its contract's address, and the judge's URL."""

    contract: str
    judge_url: str


def locate(market: MarketSettings, account: Account, client: Coordinator) -> Place | None:
    """Return the swarm's market; None if it has none.

    The settings take precedence over the deployment file, that over the account service.
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
        self._record_file = record_file
        self._market: Market | None = None
        self._judge: JudgeClient | None = None
        self._is_none_logged = False
        self._outage = Outage(log)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # A clue, with its row; from the thread to the round loop, and back with the beliefs.
        self._asked: tuple[Clue, Row] | None = None
        self._seen: Clue | None = None
        self._opinion: tuple[Clue, Row] | None = None
        self._thread = threading.Thread(target=self._run, name="market", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; a request in progress is waited for, up to its time limit."""
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

        It takes at most about `market.seconds_per_round`. A round that opens meanwhile begins after
        it, so that is the longest delay.
        """
        with self._lock:
            asked = self._asked
        if asked is None:
            return
        clue, row = asked
        # Before the model is asked: if that ends the worker, it is not asked again at the restart.
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
            try:
                if self._find():
                    self.step()
                    self._outage.end("prediction market answers again")
            except WorkerError as error:
                self._outage.begin("prediction market waits error=%s", error)
            self._closing.wait(self._settings.poll_seconds)

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
        """Look once at open bets, then at the judge's clue. Errors leave the journal as it is."""
        market, judge = self._market, self._judge
        if market is None or judge is None:
            return
        for row in self.journal.open_rows(market.address):
            try:
                self._follow(market, row)
            except ContractRefused as refusal:
                self._note_refusal(row, refusal)
        self._take_opinion(market)
        clue = judge.clue()
        if not clue.is_open or clue == self._seen:
            return
        reason = self._obstacle(market, clue)
        if reason is not None:  # the judge is ahead of the chain for a moment, or talks nonsense
            log.debug("clue ignored game=%d round=%d %s", clue.game_id, clue.clue_id, reason)
            return
        creation = market.creation(clue.game_id) or ""
        if not self.journal.has(market.address, clue.game_id, clue.clue_id, creation):
            self._ask(market, clue, creation)
        self._seen = clue

    def _ask(self, market: Market, clue: Clue, creation: str) -> None:
        """Hand a clue to the round loop."""
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

    def _take_opinion(self, market: Market) -> None:
        """Write down the decision on the clue that the model was asked about, and send the bet."""
        with self._lock:
            opinion = self._opinion
        if opinion is None:
            return
        clue, row = opinion
        row = self._decide(market, clue, row)
        self.journal.decide(row)
        with self._lock:
            self._opinion = None
        if row.state == "planned":
            self._send(market, row, clue.choices[row.choice])
        else:
            self._record(row, f"no bet: {row.reason}")

    def _decide(self, market: Market, clue: Clue, row: Row) -> Row:
        """Return the row with the bet, or with the reason why there is none."""
        bet, reason = Bet(0, 0), row.reason or self._obstacle(market, clue)
        if reason is None and _is_replaced(market, row):
            reason = _REPLACED
        if reason is None:
            bet = self._bet(market, clue, row.beliefs)
            reason = None if bet.amount else "the policy makes no bet"
        return replace(
            row,
            choice=bet.choice,
            amount=bet.amount,
            state="planned" if reason is None else "skipped",
            changed_at=time.time(),
            reason=reason,
        )

    def _obstacle(self, market: Market, clue: Clue) -> str | None:
        """Return why there is no bet on the clue: contract and judge must agree on the game."""
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

    def _bet(self, market: Market, clue: Clue, beliefs: Sequence[float]) -> Bet:
        balance = market.balance(self._peer_id)
        if self._settings.policy == "even":
            return policies.even(beliefs, balance, clue.rounds_remaining)
        prices = [
            (market.price(clue.game_id, clue.clue_id, choice) / TOKEN) ** 2
            for choice in range(len(beliefs))
        ]
        return policies.kelly(beliefs, prices, balance, self._settings.kelly_fraction)

    def _send(self, market: Market, row: Row, choice: str = "") -> None:
        """Send a bet of the journal. If the answer is lost, `_follow` reads the contract."""
        shown = printable(choice)[:_MAX_CHOICES_SHOWN] or f"choice {row.choice}"
        # Before the attempt: on a foreign market none may follow one whose result is not known.
        self.journal.move(row, "sent")
        try:
            self._account.guess_answer(
                market, row.game, self._peer_id, row.round, row.choice, row.amount
            )
        except ContractRefused as refusal:
            if refusal.name == "AlreadyGuessed":
                return
            self.journal.move(row, "missed", refusal.name or str(refusal))
            self._record(row, f"no bet: the contract refused it ({refusal.name or 'no reason'})")
        else:
            self._record(row, f"placed bet of {row.amount / TOKEN:.3f} on {shown!r}")

    # ---- bets on their way

    def _follow(self, market: Market, row: Row) -> None:
        """Move an open row on, as far as the contract has it."""
        if row.state in ("planned", "sent"):
            self._confirm(market, row)
        else:
            self._claim(market, row)

    def _confirm(self, market: Market, row: Row) -> None:
        if _is_replaced(market, row):
            self._give_up(row, _REPLACED)
            return
        guess = market.guess_of(row.game, self._peer_id, row.round, row.block)
        if guess is not None:
            self.journal.move(row, "confirmed")
            return
        is_over = market.current_round(row.game) != row.round or self._is_cancelled(market, row)
        if is_over:
            self._give_up(row, "it was not on the chain when the round ended")
        elif row.state == "planned" or (market.version is not None and _is_old(row)):
            self._send(market, row)

    def _is_cancelled(self, market: Market, row: Row) -> bool:
        if market.version is None:
            return False
        return market.game(row.game).status == GameStatus.CANCELLED

    def _claim(self, market: Market, row: Row) -> None:
        """Rate a bet whose answer is known, and claim what it is paid."""
        if market.version is not None and self._is_lost(market, row):
            # The chain was restored from before it: as if the answer to the bet were lost.
            self.journal.move(row, "sent")
            return
        right = market.right_choice(row.game, row.block)
        is_cancelled = right is None and self._is_cancelled(market, row)
        if (right is not None or is_cancelled) and _is_replaced(market, row):
            self._give_up(row, _REPLACED)
            return
        if right is not None and row.brier is None and row.beliefs:
            self.journal.rate(row, policies.brier(row.beliefs, right))
        if market.version is None:
            self._claim_from_foreign(market, row, right)
        elif right is not None or is_cancelled:
            payout, is_claimed = market.payout(row.game, self._peer_id)
            self._claim_known(market, row, payout, is_claimed, is_refund=is_cancelled)

    def _is_lost(self, market: Market, row: Row) -> bool:
        """Return whether the chain does not have a confirmed bet any more."""
        return market.guess_of(row.game, self._peer_id, row.round, row.block) is None

    def _give_up(self, row: Row, why: str) -> None:
        self.journal.move(row, "missed", why)
        self._record(row, f"no bet: {why}")

    def _note_refusal(self, row: Row, refusal: ContractRefused) -> None:
        """Give up a bet of a game that the chain lost; try others again at the next step.

        The judge may bring the game back, so that takes a while.
        """
        if refusal.name == "UnknownGame" and time.time() - row.changed_at > _FORGET_SECONDS:
            self._give_up(row, _REPLACED)
        elif row.reason != str(refusal):
            self.journal.note(row, str(refusal))
            log.warning("bet waits game=%d round=%d %s", row.game, row.round, refusal)

    def _claim_known(
        self, market: Market, row: Row, payout: int, is_claimed: bool, is_refund: bool = False
    ) -> None:
        if is_claimed:
            self.journal.move(row, "paid")
            if row.state == "claiming":  # the game's other bets are paid by the same claim
                tokens = f"{payout / TOKEN:.3f}"
                refund = f"got back {tokens}: the game was cancelled"
                self._record(row, refund if is_refund else f"claimed {tokens} for the game")
        elif payout == 0:
            self.journal.move(row, "lost")
            self._record(row, "lost")
        elif row.state == "confirmed" or _is_old(row):
            self.journal.move(row, "claiming")
            self._send_claim(market, row)

    def _claim_from_foreign(self, market: Market, row: Row, right: int | None) -> None:
        """Claim from a market that does not say what it pays, or whether it has.

        It pays once in any case, so a claim whose answer was lost may be repeated.
        """
        if right is None:
            return
        for event in market.events("RewardClaimed", {"gameIdx": row.game}, row.block):
            if event.arguments["peerId"] == self._peer_id:
                paid = event.arguments["betTokensOut"]
                self._claim_known(market, row, paid, is_claimed=True)
                return
        # After the events: a market may take the shares when it pays.
        if not market.shares_of(row.game, right, self._peer_id):
            self.journal.move(row, "lost")
            self._record(row, "lost")
            return
        if row.state == "confirmed" or _is_old(row):
            self.journal.move(row, "claiming")
            self._send_claim(market, row)

    def _send_claim(self, market: Market, row: Row) -> None:
        try:
            self._account.claim_reward(market, row.game, self._peer_id)
        except ContractRefused as refusal:
            if refusal.name != "AlreadyClaimed":
                raise

    # ----

    def _record(self, row: Row, what: str) -> None:
        """Append a line that the guide's users know: Game, Round, and what was done."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        line = f"[{stamp}] Game {row.game} Round {row.round}: {what}"
        log.info("prediction market game=%d round=%d %s", row.game, row.round, what)
        try:
            self._record_file.parent.mkdir(parents=True, exist_ok=True)
            with self._record_file.open("a") as stream:
                stream.write(line + "\n")
        except OSError as error:
            log.warning(
                "record of the prediction market not written file=%s error=%s",
                self._record_file,
                error.strerror,
            )


def _is_replaced(market: Market, row: Row) -> bool:
    """Return whether the chain lost the row's game and gave its number to another one."""
    creation = market.creation(row.game) if row.creation else None
    return creation not in (None, row.creation)


def _is_old(row: Row) -> bool:
    """Return whether what was sent for the row should have arrived by now."""
    return time.time() - row.changed_at > RESEND_SECONDS

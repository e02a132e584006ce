"""The keeper (`hivewright keeper`): ends rounds, publishes bootnodes and starts audits.

A round ends when enough peers have reported or the time is up. The keeper reads everything about a
round from the chain's log: the peers that reported, and when the round began (the block of the
RoundAdvanced event). So the keeper can be restarted, or run twice (in separate folders), and the
chain may lose its last second.
"""

import json
import logging
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from worker import settings
from worker.chain.audit_scheduler import AUDIT_FOLDER, Audits
from worker.chain.client import NonceUsed, ReceiptTimeout, TransactionRefused
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.keeper_status import STATUS_FILE, Status
from worker.errors import ChainUnreachable, ContractRefused, ResourceError, WorkerError
from worker.log import discreet
from worker.runtime import host
from worker.runtime.files import write_whole
from worker.runtime.outage import Outage
from worker.runtime.processes import exit_on_signals
from worker.runtime.systemd import progress, ready

log = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 30.0
_MINING_SECONDS = 30.0
"""Time limit in seconds for a transaction of the keeper to be mined."""
_MEMORY_ROUNDS = 2
"""A peer is expected in a round if it reported in one of this many previous rounds."""


@dataclass(slots=True)
class Round:
    """The open round. `reports` maps rounds to the peers that reported in them.

    `seen_block`, with hash `seen_hash`, is the last block that was read.
    """

    number: int
    began_at: float
    seen_block: int
    seen_hash: str | None = None
    reports: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))


def run(settings: settings.Settings) -> None:
    """Run the keeper until SIGTERM or SIGINT. It waits for a chain that can't be reached.

    Raises ChainError if the chain is another one, the contract is gone, or the owner's key is
    missing or lacks the right to advance rounds, ResourceError if another process uses
    `keeper.state_dir`.
    """
    exit_on_signals()
    keeper = Keeper(settings)
    with host.lock_folder(settings.keeper.state_dir, "keeper.state_dir"):
        ready()
        try:
            keeper.keep()
        finally:
            keeper.stop()


def verdict(
    reporters: set[str],
    expected: set[str],
    is_populated: bool,
    seconds: float,
    keeper: settings.Keeper,
) -> Literal["ready", "time"] | None:
    """Return the reason to end the round now; None: it continues.

    `is_populated`: at least `min_peers` peers are registered.
    """
    if not is_populated or seconds < keeper.min_round_seconds:
        return None
    if seconds >= keeper.round_seconds:
        return "time"
    have_reported = len(reporters & expected) >= needed(expected, keeper)
    return "ready" if have_reported and len(reporters) >= keeper.min_peers else None


def needed(
    expected: set[str],
    keeper: settings.Keeper,
) -> int:
    """Return the number of expected peers that must report.

    The epsilon absorbs rounding: 0.07 * 100 is slightly more than 7, and must not become 8.
    """
    return math.ceil(keeper.ready_fraction * len(expected) - 1e-9)


def _with_own_contract(settings: settings.Settings) -> settings.Chain:
    """Return the chain's settings, with the keeper's deployment file if they name no contract."""
    chain = settings.chain
    if any((chain.contract, chain.deployment_file, chain.account_url)):
        return chain
    return chain.model_copy(
        update={"deployment_file": settings.keeper.state_dir / anvil.DEPLOYMENT_FILE}
    )


class Keeper:
    """The polling loop, with a cache of the data that it has read from the chain."""

    def __init__(self, settings: settings.Settings) -> None:
        self._settings = settings.keeper
        self._chain = _with_own_contract(settings)
        self._coordinator = Coordinator(self._chain)
        self._owner = anvil.load_owner(settings.keeper)
        self._status_file = settings.keeper.state_dir / STATUS_FILE
        self._published_file = settings.keeper.state_dir / "published.json"
        self._status = Status()
        self._outage = Outage(log)
        self._problem: str | None = None
        self._is_checked = False
        self._is_populated = False
        self._round: Round | None = None
        self._bootnodes: list[str] | None = None
        self._audits = Audits(
            settings.model_copy(update={"chain": self._chain}),
            settings.keeper.state_dir / AUDIT_FOLDER,
        )

    def keep(self) -> None:
        """Poll forever."""
        pause = self._settings.poll_seconds
        while True:
            try:
                self.look()
                pause = self._settings.poll_seconds
            except ChainUnreachable as error:
                self._outage.begin("chain unreachable, waiting for it: %s", error)
                self._tell(
                    Status("chain-unreachable", self._status.round, problem=discreet(str(error)))
                )
                # The deployment file may name another address by now: locate the chain again.
                self._coordinator = Coordinator(self._chain)
                self._is_checked = False
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except (NonceUsed, ReceiptTimeout) as error:
                log.warning("transaction lost, looking again: %s", error)
                self._fail(error)
            except (TransactionRefused, ContractRefused) as error:
                # A named refusal concerns the keeper's rights and is final; other reasons come from
                # the chain's node and may be temporary.
                if isinstance(error, ContractRefused) and error.name:
                    raise
                log.warning("transaction refused, trying again: %s", error)
                self._fail(error)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            progress(
                f"{self._status.state} round={self._status.round}"
                f" reporters={self._status.reporters}"
            )
            time.sleep(pause)

    def look(self) -> None:
        """Read the chain once, and end the round if it is due."""
        if not self._is_checked:
            # After an outage it may be another chain, or lack our contract.
            self._coordinator.check()
            self._is_checked, self._round = True, None
            self._outage.end("chain answers again")
        number, block = self._coordinator.current_round(), self._coordinator.block_number()
        is_known = self._is_known(number, block)
        self._sync_bootnodes(again=not is_known)
        if self._round is None or not is_known:
            self._round = self._find(number)
        self._read_reports(self._round, block)
        reporters = self._round.reports[number]
        earlier = [peers for round, peers in self._round.reports.items() if round != number]
        expected = set().union(*earlier)
        # If a round has ended there were enough peers, even if the log of registrations is gone.
        self._is_populated = self._is_populated or number > 0 or self._has_min_peers()
        self._tell(
            Status(
                "round-open" if self._is_populated else "waiting-for-peers",
                number,
                len(reporters),
                needed(expected, self._settings),
                self._round.began_at,
                self._settings.round_seconds,
                self._problem,
            )
        )
        seconds = max(0.0, time.time() - self._round.began_at)
        self._audits.see(number)
        reason = verdict(reporters, expected, self._is_populated, seconds, self._settings)
        if reason and self._advance(number):
            self._problem = None
            log.info(
                "round advanced round=%d reporters=%d expected=%d seconds=%.1f reason=%s",
                number,
                len(reporters),
                len(expected),
                seconds,
                reason,
            )

    def _is_known(
        self,
        number: int,
        block: int,
    ) -> bool:
        """Return whether the cached round is still open, and the blocks read are on the chain."""
        known = self._round
        if known is None or known.number != number or known.seen_block > block:
            return False
        return (
            known.seen_hash is None
            or self._coordinator.block_hash(known.seen_block) == known.seen_hash
        )

    def stop(self) -> None:
        self._audits.close()
        self._tell(Status("stopped", self._status.round))

    # ---- the round

    def _find(self, number: int) -> Round:
        """Return the round, with the time of its beginning from the chain's log.

        If the log is gone, the round's time counts from now.
        """
        first = max(0, number - _MEMORY_ROUNDS)
        began: dict[int, int] = {}
        numbers = [n for n in range(first, number + 1) if n > 0]
        advanced = self._coordinator.events(
            "RoundAdvanced", {"newRoundNumber": numbers}, newest_first=True
        )
        while len(began) < len(numbers) and (event := next(advanced, None)):
            began.setdefault(event.arguments["newRoundNumber"], event.block)
        if first == 0:
            # Round 0 began with the contract.
            blocks = [event.block for event in self._coordinator.events("Initialized")]
            began[0] = min(blocks, default=0)
        if number not in began:
            log.warning(
                "no log of the round's beginning, its time counts from now round=%d", number
            )
            oldest = min(began.values(), default=self._coordinator.block_number())
            return Round(number, time.time(), oldest - 1)
        oldest = min(began.values())
        return Round(number, self._coordinator.block_time(began[number]), oldest - 1)

    def _read_reports(
        self,
        current: Round,
        block: int,
    ) -> None:
        """Add the reports since the last poll, for this round and the previous ones that matter."""
        first = max(0, current.number - _MEMORY_ROUNDS)
        numbers = list(range(first, current.number + 1))
        events = self._coordinator.events(
            "RewardSubmitted",
            {"roundNumber": numbers},
            from_block=current.seen_block + 1,
            to_block=block,
        )
        for event in events:
            said = event.arguments
            current.reports[said["roundNumber"]].add(said["peerId"])
        current.seen_block, current.seen_hash = block, self._coordinator.block_hash(block)

    def _has_min_peers(self) -> bool:
        registered = set()
        for event in self._coordinator.events("PeerRegistered"):
            registered.add(event.arguments["peerId"])
            if len(registered) >= self._settings.min_peers:
                return True
        return False

    def _advance(self, number: int) -> bool:
        """End the round and return True; False if another keeper ended it.

        On our contract the expected round is a condition of the transaction itself.
        """
        if self._coordinator.version is None:
            return self._advance_foreign(number)
        try:
            self._coordinator.transact(
                self._owner, self._coordinator.advance_round(number), _MINING_SECONDS
            )
        except ContractRefused as error:
            if error.name != "RoundMovedOn":
                raise
            return False
        return True

    def _advance_foreign(self, number: int) -> bool:
        """End the round by ending its stages, unless another keeper has.

        A foreign contract has no condition on the round, so the nonce serves as one. It is read
        before the round: if another keeper with our key ends the stage after that, our transaction
        is refused (NonceUsed). This does not protect against a keeper with another key.
        """
        has_advanced = False
        for _ in range(self._coordinator.read("stageCount()")):
            nonce = self._coordinator.nonce(self._owner.address)
            if self._coordinator.current_round() != number:
                break
            call = self._coordinator.update_stage_and_round()
            self._coordinator.transact(self._owner, call, _MINING_SECONDS, nonce)
            has_advanced = True
        return has_advanced

    # ---- bootnodes

    def _sync_bootnodes(self, again: bool) -> None:
        """Publish the bootnodes in the settings, and withdraw published ones that are not there.

        Does nothing if the settings name the same ones as before, unless `again`. Bootnodes that
        others added stay. The list is on disk before it is published, so that a crash leaves no
        entry that the keeper does not know.
        """
        wanted = self._wanted_bootnodes()
        if wanted == self._bootnodes and not again:
            return
        present = self._coordinator.bootnodes()
        ours: set[str] = set()
        if self._published_file.exists():
            ours.update(json.loads(self._published_file.read_text()))
        if not ours.issuperset(wanted):
            write_whole(self._published_file, json.dumps(sorted(ours.union(wanted))))
        missing = [multiaddr for multiaddr in wanted if multiaddr not in present]
        if missing:
            self._coordinator.transact(
                self._owner, self._coordinator.add_bootnodes(missing), _MINING_SECONDS
            )
            log.info("bootnodes published added=%s", missing)
        for multiaddr in sorted(ours.difference(wanted)):
            self._withdraw(multiaddr)
        if not ours.issubset(wanted):
            write_whole(self._published_file, json.dumps(sorted(wanted)))
        self._bootnodes = wanted

    def _wanted_bootnodes(self) -> list[str]:
        """Return the bootnodes in the settings and in `keeper.bootnode_file`, if that exists."""
        wanted = list(self._settings.publish_bootnodes)
        file = self._settings.bootnode_file
        if file is not None:
            try:
                wanted += file.read_text().split()
            except FileNotFoundError:
                pass
            except (OSError, UnicodeDecodeError) as error:
                reason = (
                    f"{file} (keeper.bootnode_file): can't be read: {error}; expected the"
                    " bootnode's multiaddr"
                )
                raise ResourceError(reason) from None
        return list(dict.fromkeys(wanted))

    def _withdraw(self, multiaddr: str) -> None:
        present = self._coordinator.bootnodes()
        if multiaddr not in present:
            return
        if self._coordinator.version is None:
            call = self._coordinator.remove_bootnode(present.index(multiaddr))
        else:
            call = self._coordinator.withdraw_bootnode(multiaddr)
        self._coordinator.transact(self._owner, call, _MINING_SECONDS)
        log.info("bootnode withdrawn removed=%s", multiaddr)

    # ----

    def _fail(self, error: WorkerError) -> None:
        """Put the reason why a transaction failed into the status, until one succeeds."""
        self._problem = discreet(str(error))
        self._tell(replace(self._status, problem=self._problem))

    def _tell(self, status: Status) -> None:
        if status != self._status:
            write_whole(self._status_file, json.dumps(asdict(status)) + "\n")
            self._status = status

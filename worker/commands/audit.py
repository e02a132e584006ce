"""`hivewright audit`: verify submitted rewards from the groups that peers signed.

The transaction of each reward carries the digest of its groups (docs/decisions/0015). A request to
the peer for the groups of that digest gets exactly those, or nothing. The audit makes their tasks
again, scores their completions and computes the reward. There are three verdicts:

    audited        the groups are there, and worth at least what was submitted
    contradicted   the groups are there, and can't have earned it; they are kept as evidence
    unaudited      not drawn, or undecidable: the groups are not served, of unknown tasks or
                   too long
"""

import argparse
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from worker import environments
from worker.chain.audit_scheduler import AUDIT_FOLDER
from worker.chain.coordinator import Coordinator, Event
from worker.errors import BadRecord, ResourceError, SettingsError, SwarmError
from worker.log import printable
from worker.records import milli_reward
from worker.runtime.cells import add_row
from worker.runtime.files import write_whole
from worker.runtime.host import lock_folder
from worker.settings import Settings, chain_of_node
from worker.swarm.exchange.archive import Archive
from worker.swarm.exchange.verify import INNOCENT, Verifier
from worker.swarm.identity import animal_name
from worker.swarm.protocol import messages

log = logging.getLogger(__name__)

REPORT_FILE = "audit.json"
EVIDENCE_FOLDER = "evidence"
REPORT_VERSION = 1
NOT_DRAWN = "not drawn"
MAX_FINDINGS = 20_000
# Peers may have larger limits than we would collect with; what travels bounds both.
_MAX_GROUPS, _MAX_COMPLETIONS, _MAX_COMPLETION_BYTES = 1024, 256, 1 << 20
_SCORING_SECONDS = 60.0
"""Time limit for scoring the groups of one reward."""

Verdict = Literal["audited", "unaudited", "contradicted"]
VERDICTS: tuple[Verdict, ...] = ("audited", "unaudited", "contradicted")
Find = Callable[[str, str], bytes]
"""Return the groups of a peer by their digest. Raises SwarmError if they are not available."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one submitted reward. Rewards are in thousandths, `at` is Unix seconds.

    `earned` is the most that the groups can have earned, None if that is not known; `evidence` is
    the file with the signed groups of a contradiction, next to the report.
    """

    round: int
    stage: int
    peer_id: str
    account: str
    claimed: int
    verdict: Verdict
    reason: str | None
    earned: int | None
    num_groups: int | None
    digest: str | None
    tx_hash: str
    at: float
    evidence: str | None = None

    @property
    def key(self) -> tuple[int, int, str]:
        return self.round, self.stage, self.peer_id


class Auditor:
    """Recompute rewards of the swarm of `coordinator` from the groups that `find` returns."""

    def __init__(self, coordinator: Coordinator, verifier: Verifier, find: Find) -> None:
        self._coordinator = coordinator
        self._verifier = verifier
        self._find = find

    def audit(self, submitted: Event) -> tuple[Finding, bytes | None]:
        """Judge one RewardSubmitted event; the bytes are the evidence, if it is contradicted."""
        finding = unjudged(submitted, self._coordinator.reward_digest(submitted.tx_hash))
        if finding.digest is None:
            return replace(finding, reason="no digest of groups came with it"), None
        try:
            sealed = self._find(finding.peer_id, finding.digest)
        except SwarmError as error:
            return replace(finding, reason=printable(f"groups not to be had: {error}")), None
        if messages.groups_digest(sealed) != finding.digest:
            return replace(finding, reason="what is served is not what it committed to"), None
        judged = self._judge(finding, sealed)
        return judged, sealed if judged.verdict == "contradicted" else None

    def _judge(self, finding: Finding, sealed: bytes) -> Finding:
        try:
            groups = messages.open_groups(
                sealed, finding.peer_id, finding.round, self._verifier.limits
            )
        except BadRecord as error:
            if error.reason == "too-large":
                return replace(finding, reason=str(error))
            reason = f"what it committed to are no groups that it signed for this round: {error}"
            return replace(finding, verdict="contradicted", reason=printable(reason), earned=0)
        try:
            until = time.monotonic() + _SCORING_SECONDS
            scored, bad = self._verifier.verify_all(finding.peer_id, finding.round, groups, until)
        except BadRecord as error:
            return replace(finding, reason=str(error), num_groups=len(groups))
        # Too long by our own limit; its own may be higher.
        unknown = [error for error in bad if error.reason in INNOCENT or error.reason == "too-long"]
        # What can't be judged here may have earned everything; what is invalid has earned nothing.
        means = [*(group.mean_reward for group in scored), *(1.0 for _ in unknown)]
        means += [0.0] * (len(groups) - len(means))
        earned = milli_reward(means)
        finding = replace(finding, earned=earned, num_groups=len(groups))
        if finding.claimed > earned:
            held = (
                f", {len(bad) - len(unknown)} of them are invalid"
                if len(bad) > len(unknown)
                else ""
            )
            reason = f"its {len(groups)} groups can have earned {earned} at most{held}"
            return replace(finding, verdict="contradicted", reason=reason)
        if unknown:
            return replace(
                finding,
                reason=(
                    f"{len(unknown)} of {len(groups)} groups are of tasks not known here, or too"
                    " long"
                ),
            )
        return replace(finding, verdict="audited", reason=None)


def unjudged(submitted: Event, digest: str | None = None) -> Finding:
    """Return a finding for a reward as the chain has it."""
    said = submitted.arguments
    return Finding(
        round=int(said["roundNumber"]),
        stage=int(said["stageNumber"]),
        peer_id=str(said["peerId"]),
        account=str(said["account"]),
        claimed=int(said["reward"]),
        verdict="unaudited",
        reason=NOT_DRAWN,
        earned=None,
        num_groups=None,
        digest=digest,
        tx_hash=submitted.tx_hash,
        at=time.time(),
    )


def submitted_rewards(coordinator: Coordinator, num_rounds: int) -> list[Event]:
    """Return the RewardSubmitted events of the newest `num_rounds` rounds, the open one too."""
    current = coordinator.current_round()
    first = max(0, current - num_rounds + 1)
    began = None  # round 0 began with the contract
    if first > 0:
        began = next(
            coordinator.events("RoundAdvanced", {"newRoundNumber": first}, newest_first=True), None
        )
    # Rewards of older rounds may have come later.
    events = coordinator.events(
        "RewardSubmitted", from_block=None if began is None else began.block
    )
    return [event for event in events if event.arguments["roundNumber"] >= first]


class Report:
    """The published result: `audit.json` in `folder`, and evidence; earlier findings are kept."""

    def __init__(self, folder: Path, coordinator: Coordinator) -> None:
        self._folder = folder
        self._deployment = coordinator.deployment
        self.findings = {finding.key: finding for finding in self._read()}

    def is_settled(self, submitted: Event) -> bool:
        """Return whether another audit of the reward can't tell anything new."""
        known = self.findings.get(unjudged(submitted).key)
        return (
            known is not None
            and known.verdict != "unaudited"
            and known.tx_hash == submitted.tx_hash
        )

    def note(self, finding: Finding, evidence: bytes | None = None) -> None:
        """Add a finding; an undecided one does not replace a decided one."""
        known = self.findings.get(finding.key)
        is_known = (
            known is not None
            and known.tx_hash == finding.tx_hash
            and finding.verdict == "unaudited"
        )
        if (
            is_known
            and known is not None
            and (known.verdict != "unaudited" or finding.reason == NOT_DRAWN)
        ):
            return
        if evidence is not None:
            file = f"{EVIDENCE_FOLDER}/{finding.round}-{finding.digest}.groups"
            write_whole(self._folder / file, evidence)
            finding = replace(finding, evidence=file)
            log.warning(
                "reward contradicted peer_id=%s round=%d claimed=%d earned=%s reason=%s",
                finding.peer_id,
                finding.round,
                finding.claimed,
                finding.earned,
                finding.reason,
            )
        self.findings[finding.key] = finding

    def data(self) -> dict[str, Any]:
        """Return the content of audit.json, described in docs/operations/host-a-swarm.md."""
        kept = sorted(self.findings.values(), key=lambda finding: finding.key)[-MAX_FINDINGS:]
        peers: dict[str, Counter[str]] = {}
        sums: dict[str, Counter[str]] = {}
        for finding in kept:
            peers.setdefault(finding.peer_id, Counter(audited=0, unaudited=0, contradicted=0))[
                finding.verdict
            ] += 1
            claimed = sums.setdefault(
                finding.peer_id, Counter(audited=0, unaudited=0, contradicted=0)
            )
            claimed[finding.verdict] += finding.claimed
        return {
            "version": REPORT_VERSION,
            "chain_id": self._deployment.chain_id,
            "contract": self._deployment.contract,
            "updated_at": time.time(),
            "counts": dict(sum(peers.values(), Counter())) if peers else {},
            "peers": {peer_id: dict(counts) for peer_id, counts in sorted(peers.items())},
            "sums": {peer_id: dict(claimed) for peer_id, claimed in sorted(sums.items())},
            "rewards": [asdict(finding) for finding in kept],
        }

    def write(self) -> None:
        write_whole(self._folder / REPORT_FILE, json.dumps(self.data(), indent=1) + "\n")

    def _read(self) -> Iterable[Finding]:
        """Return the findings about this contract; a damaged or foreign report is replaced."""
        file = self._folder / REPORT_FILE
        try:
            raw = json.loads(file.read_text())
            if (raw["version"], raw["contract"]) == (REPORT_VERSION, self._deployment.contract):
                return [Finding(**entry) for entry in raw["rewards"]]
            log.warning("report of another contract or version is replaced file=%s", file)
        except FileNotFoundError:
            log.info("first report file=%s", file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("report can't be read, starting a new one file=%s error=%r", file, error)
        return []


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Audit once, write the report, and print it.

    Raises ChainUnreachable or ChainError if the chain can't be read, SettingsError for unknown task
    families or a missing folder of groups.
    """
    for groups in options.groups:
        if not groups.is_dir():
            raise SettingsError(
                f"--groups {groups}: no such folder; expected a node's groups/, below its state"
                " folder"
            )
    folder = options.output or settings.audit.state_dir or settings.keeper.state_dir / AUDIT_FOLDER
    report = audit(settings, folder, options.groups, options.rounds, options.sample)
    if options.json:
        print(json.dumps(report.data(), indent=2))
    else:
        _print(report, folder)


def audit(
    settings: Settings,
    folder: Path,
    groups: Sequence[Path] = (),
    num_rounds: int | None = None,
    num_rewards: int | None = None,
) -> Report:
    """Run one audit and write its report to `folder`.

    `groups`: folders of signed groups, read instead of asking peers.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder} (audit.state_dir): {error.strerror}; expected a folder to write in"
        ) from None
    coordinator = Coordinator(chain_of_node(settings.chain, settings.node.state_dir))
    coordinator.check()
    wide = settings.swarm.model_copy(
        update={"max_groups_per_peer": _MAX_GROUPS, "max_completion_bytes": _MAX_COMPLETION_BYTES}
    )
    verifier = Verifier(
        environments.load(settings.environment), wide, max_group_size=_MAX_COMPLETIONS
    )
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder, "audit.state_dir"))
        report = Report(folder, coordinator)
        submitted = submitted_rewards(coordinator, num_rounds or settings.audit.rounds)
        for event in submitted:
            report.note(unjudged(event))
        open_events = [event for event in submitted if not report.is_settled(event)]
        # Nobody can know beforehand what is drawn.
        drawn = random.SystemRandom().sample(
            open_events, min(num_rewards or settings.audit.sample, len(open_events))
        )
        if drawn:
            find = (
                _in_folders(groups) if groups else _ask_peers(settings, folder, coordinator, stack)
            )
            auditor = Auditor(coordinator, verifier, find)
            for event in drawn:
                report.note(*auditor.audit(event))
        report.write()
    counts = Counter(finding.verdict for finding in report.findings.values())
    log.info(
        "audited drawn=%d of=%d audited=%d unaudited=%d contradicted=%d",
        len(drawn),
        len(submitted),
        counts["audited"],
        counts["unaudited"],
        counts["contradicted"],
    )
    return report


def _in_folders(folders: Sequence[Path]) -> Find:
    def find(peer_id: str, digest: str) -> bytes:
        for folder in folders:
            if (sealed := Archive(folder, 1).find(digest)) is not None:
                return sealed
        raise SwarmError(f"none with this digest in {', '.join(map(str, folders))}")

    return find


def _ask_peers(
    settings: Settings, folder: Path, coordinator: Coordinator, stack: ExitStack
) -> Find:
    from worker.swarm.exchange.audit_client import (
        Listener,  # hivemind takes seconds to load: only where peers are asked
    )

    listener = stack.enter_context(Listener(settings.swarm, folder, settings.audit.timeout_seconds))
    listener.join_through(coordinator.bootnodes())
    return listener.find


def _print(report: Report, folder: Path) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("round", "peer", "submitted", "worth", "verdict", "reason"):
        table.add_column(
            column, justify="right" if column in ("round", "submitted", "worth") else "left"
        )
    findings = [found for _, found in sorted(report.findings.items())]
    for found in findings:
        if found.reason != NOT_DRAWN:
            worth = "" if found.earned is None else f"{found.earned / 1000:.3f}"
            name, reason = animal_name(found.peer_id), found.reason or ""
            add_row(
                table,
                found.round,
                name,
                f"{found.claimed / 1000:.3f}",
                worth,
                found.verdict,
                reason,
            )
    console.print(table)
    counts = Counter(found.verdict for found in findings)
    sums = {
        verdict: sum(found.claimed for found in findings if found.verdict == verdict)
        for verdict in VERDICTS
    }
    print(
        ", ".join(
            f"{counts[verdict]} {verdict} (rewards of {sums[verdict] / 1000:.3f})"
            for verdict in VERDICTS
        )
    )
    for found in findings:
        if found.verdict == "contradicted":
            print(
                f"contradicted: {printable(found.peer_id)} of account {found.account} in round"
                f" {found.round}: submitted {found.claimed}, worth {found.earned}; evidence in"
                f" {folder / str(found.evidence)}"
            )

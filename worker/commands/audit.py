"""`hivewright audit`: verify submitted rewards from the groups that peers signed.

The transaction of each reward contains the digest of its groups (docs/decisions/0015). When a peer
is asked for the groups with that digest, it can send only these, or none. The audit makes their
tasks again, scores their completions and computes the reward. There are three verdicts:

    audited        the groups are there, and worth at least what was submitted
    contradicted   the groups are there, but can't have earned it; they are kept as evidence
    unaudited      not drawn, or undecidable: the groups are not available, of unknown tasks or
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

from pydantic import TypeAdapter
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
# Peers may have larger limits than this node's own; the wire format limits both.
_MAX_GROUPS, _MAX_COMPLETIONS, _MAX_COMPLETION_BYTES = messages.MAX_GROUPS, 256, 1 << 20
_SCORING_SECONDS = 60.0
"""Time limit for scoring the groups of one reward."""

Verdict = Literal["audited", "unaudited", "contradicted"]
VERDICTS: tuple[Verdict, ...] = ("audited", "unaudited", "contradicted")
Find = Callable[[str, str], bytes]
"""Function that returns a peer's groups by their digest, or raises SwarmError if it can't."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one submitted reward. Rewards are in thousandths, `at` is Unix seconds.

    `earned` is the most that the groups can have earned, None if that is unknown; `evidence` is the
    name of the file with the signed groups of a contradiction, next to the report.
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


_FINDINGS = TypeAdapter(list[Finding])


class Auditor:
    """Recompute rewards of the swarm of `coordinator` from the groups that `find` returns."""

    def __init__(
        self,
        coordinator: Coordinator,
        verifier: Verifier,
        find: Find,
    ) -> None:
        self._coordinator = coordinator
        self._verifier = verifier
        self._find = find

    def audit(
        self,
        submitted: Event,
    ) -> tuple[Finding, bytes | None]:
        """Judge one RewardSubmitted event; the bytes are the evidence, if it is contradicted."""
        finding = unjudged(submitted, self._coordinator.reward_digest(submitted.tx_hash))
        if finding.digest is None:
            return replace(finding, reason="its transaction has no digest of groups"), None
        try:
            sealed = self._find(finding.peer_id, finding.digest)
        except SwarmError as error:
            return replace(finding, reason=printable(f"groups not available: {error}")), None
        if messages.groups_digest(sealed) != finding.digest:
            return replace(finding, reason="the groups served do not match the digest"), None
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
            reason = f"the data of the digest are not groups that it signed for this round: {error}"
            return replace(finding, verdict="contradicted", reason=printable(reason), earned=0)
        try:
            until = time.monotonic() + _SCORING_SECONDS
            scored, bad = self._verifier.verify_all(finding.peer_id, finding.round, groups, until)
        except BadRecord as error:
            return replace(finding, reason=str(error), num_groups=len(groups))
        # "too-long" refers to our own limit; the peer's may be higher.
        undecidable = {*INNOCENT, "too-long"}
        num_unknown = sum(error.reason in undecidable for error in bad)
        num_invalid = len(bad) - num_unknown
        # Undecidable groups may have earned the maximum, invalid ones have earned nothing.
        means = [group.mean_reward for group in scored] + [1.0] * num_unknown
        means += [0.0] * (len(groups) - len(means))
        earned = milli_reward(means)
        finding = replace(finding, earned=earned, num_groups=len(groups))
        if finding.claimed > earned:
            reason = f"its {len(groups)} groups can have earned {earned} at most"
            if num_invalid:
                reason += f", {num_invalid} of them are invalid"
            return replace(finding, verdict="contradicted", reason=reason)
        if num_unknown:
            reason = f"{num_unknown} of {len(groups)} groups are of unknown tasks, or too long"
            return replace(finding, reason=reason)
        return replace(finding, verdict="audited", reason=None)


def unjudged(
    submitted: Event,
    digest: str | None = None,
) -> Finding:
    """Return the finding for a reward on the chain that is not judged yet."""
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
    from_block = None  # round 0 began with the contract
    if first > 0:
        advanced = coordinator.events("RoundAdvanced", {"newRoundNumber": first}, newest_first=True)
        began = next(advanced, None)
        from_block = None if began is None else began.block
    events = coordinator.events("RewardSubmitted", from_block=from_block)
    # Rewards of older rounds may have been submitted later.
    return [event for event in events if event.arguments["roundNumber"] >= first]


class Report:
    """The published result: `audit.json` in `folder`, and evidence; earlier findings are kept."""

    def __init__(self, folder: Path, coordinator: Coordinator) -> None:
        self._folder = folder
        self._deployment = coordinator.deployment
        self.findings = {finding.key: finding for finding in self._read()}

    def is_settled(self, submitted: Event) -> bool:
        """Return whether another audit of the reward can't change its verdict."""
        known = self.findings.get(unjudged(submitted).key)
        if known is None or known.tx_hash != submitted.tx_hash:
            return False
        return known.verdict != "unaudited"

    def note(
        self,
        finding: Finding,
        evidence: bytes | None = None,
    ) -> None:
        """Add a finding; an undecided one does not replace a decided one."""
        known = self.findings.get(finding.key)
        if known is not None and known.tx_hash == finding.tx_hash:
            is_decided = known.verdict != "unaudited"
            if finding.verdict == "unaudited" and (is_decided or finding.reason == NOT_DRAWN):
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
        ordered = sorted(self.findings.values(), key=lambda finding: finding.key)
        kept = ordered[-MAX_FINDINGS:]
        zeros = dict.fromkeys(VERDICTS, 0)
        peers: dict[str, Counter[str]] = {}
        sums: dict[str, Counter[str]] = {}
        for finding in kept:
            peers.setdefault(finding.peer_id, Counter(zeros))[finding.verdict] += 1
            sums.setdefault(finding.peer_id, Counter(zeros))[finding.verdict] += finding.claimed
        counts = Counter(finding.verdict for finding in kept)
        return {
            "version": REPORT_VERSION,
            "chain_id": self._deployment.chain_id,
            "contract": self._deployment.contract,
            "updated_at": time.time(),
            "counts": dict(counts),
            "peers": dict(sorted(peers.items())),
            "sums": dict(sorted(sums.items())),
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
                return _FINDINGS.validate_python(raw["rewards"])
            log.warning("report of another contract or version is replaced file=%s", file)
        except FileNotFoundError:
            log.info("first report file=%s", file)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
        sample_size = min(num_rewards or settings.audit.sample, len(open_events))
        # The draw must not be predictable.
        drawn = random.SystemRandom().sample(open_events, sample_size)
        if drawn:
            if groups:
                find = _in_folders(groups)
            else:
                find = _ask_peers(settings, folder, coordinator, stack)
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
    # hivemind takes seconds to import, so only audits that ask peers do it.
    from worker.swarm.exchange.audit_client import Listener

    listener = stack.enter_context(Listener(settings.swarm, folder, settings.audit.timeout_seconds))
    listener.join_through(coordinator.bootnodes())
    return listener.find


def _print(report: Report, folder: Path) -> None:
    findings = [finding for _, finding in sorted(report.findings.items())]
    Console().print(_table(findings))
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for finding in findings:
        counts[finding.verdict] += 1
        sums[finding.verdict] += finding.claimed
    totals = [f"{counts[name]} {name} (rewards of {sums[name] / 1000:.3f})" for name in VERDICTS]
    print(", ".join(totals))
    for finding in findings:
        if finding.verdict == "contradicted":
            print(
                f"contradicted: {printable(finding.peer_id)} of account {finding.account} in round"
                f" {finding.round}: submitted {finding.claimed}, worth {finding.earned}; evidence"
                f" in {folder / str(finding.evidence)}"
            )


def _table(findings: Sequence[Finding]) -> Table:
    """Return a table with a row for each finding, except those not drawn."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("round", "peer", "submitted", "worth", "verdict", "reason"):
        is_number = column in ("round", "submitted", "worth")
        table.add_column(column, justify="right" if is_number else "left")
    for finding in findings:
        if finding.reason == NOT_DRAWN:
            continue
        name, reason = animal_name(finding.peer_id), finding.reason or ""
        claimed = f"{finding.claimed / 1000:.3f}"
        worth = "" if finding.earned is None else f"{finding.earned / 1000:.3f}"
        add_row(table, finding.round, name, claimed, worth, finding.verdict, reason)
    return table

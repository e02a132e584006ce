"""Health checks for conditions that may get worse while a node runs, as one table.

Status, metrics, log, fleet status and the table in docs/operations/watch.md all derive from it. A
check measures one number of a node's status. Past its threshold it is a warning: logged once when
the threshold is crossed, shown until the number is good again, which is logged once, too.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from worker.log import discreet, printable
from worker.runtime import host_memory
from worker.swarm.status import SwarmStatus
from worker.telemetry.status import Finding, NodeStatus, Recent

log = logging.getLogger(__name__)

RECENT_ROUNDS = 8
"""Shares are averaged over this many rounds, at least ENOUGH_ROUNDS: a single one is noise."""
ENOUGH_ROUNDS = 4
ROUNDS_BEFORE, ENOUGH_BEFORE = 64, 16
"""The mean reward is compared with that of up to 64 rounds before, if there are at least 16."""
KEPT_ROUNDS = RECENT_ROUNDS + ROUNDS_BEFORE
_LEAST_REWARD = 0.05
"""A mean reward that was below this does not count as collapsed."""
_MAX_NAMED = 3
"""Number of peers that a line names."""
_RELIEF = 0.1
"""A warning ends when its number is better than the threshold by this share (hysteresis)."""
_FIGURES = {
    "truncated": "completions_clipped_ratio",
    "no_signal": "frac_reward_zero_std",
    "sampling_gap": "sampling_logp_difference_mean",
}
"""The fields of `Recent` that are averages of a step's figures (records.StepQuality)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One condition that may get worse.

    `name`: in status, log and metrics. `metric`: name of the number, after "hivewright_". `what`:
    its description. `measure` returns the number; None: unknown or not applicable. `show` returns
    it as text for people. `warn`, `severe`: thresholds; `is_low`: values below them are bad.
    `advice`: what to do.
    """

    name: str
    metric: str
    what: str
    unit: str
    measure: Callable[[NodeStatus], float | None]
    show: Callable[[NodeStatus], str]
    warn: float
    advice: str
    severe: float | None = None
    is_low: bool = False

    def is_past(
        self,
        value: float,
        threshold: float | None,
    ) -> bool:
        if threshold is None:
            return False
        return value < threshold if self.is_low else value > threshold

    def relieved(self, threshold: float) -> float:
        """Return the threshold at which an active warning ends."""
        return threshold + (1 if self.is_low else -1) * _RELIEF * abs(threshold)

    def bounds(self, threshold: float) -> str:
        return f"{'below' if self.is_low else 'above'} {threshold:g}{self.unit and ' ' + self.unit}"


def find(
    node: NodeStatus,
    active: Collection[str] = (),
) -> tuple[Finding, ...]:
    """Return the checks that are past their threshold.

    `active`: names of the checks that were past it before.
    """
    found = []
    for check in CHECKS:
        value = check.measure(node)
        if value is None:
            continue
        warn = check.relieved(check.warn) if check.name in active else check.warn
        is_severe = check.is_past(value, check.severe)
        if is_severe or check.is_past(value, warn):
            text = (
                f"{discreet(check.show(node))} (a warning {check.bounds(check.warn)});"
                f" {check.advice}"
            )
            found.append(Finding(check.name, "severe" if is_severe else "warning", text))
    return tuple(found)


def watch(node: NodeStatus) -> None:
    """Update the node's warnings; log those that are new, newly severe, or over."""
    before = {finding.check: finding.severity for finding in node.warnings}
    node.warnings = find(node, before)
    for finding in node.warnings:
        if before.pop(finding.check, "") not in (finding.severity, "severe"):
            log.log(_LEVELS[finding.severity], "%s: %s", finding.check, printable(finding.text))
    for name in before:
        log.info("good again: %s: %s", name, printable(BY_NAME[name].show(node)))


_LEVELS = {"warning": logging.WARNING, "severe": logging.ERROR}


def recent(rounds: Iterable[Mapping[str, Any]]) -> Recent:
    """Return the means of the last rounds' records (status.RoundRecord, as dicts)."""
    known = list(rounds)
    last, before = known[-RECENT_ROUNDS:], known[-KEPT_ROUNDS:-RECENT_ROUNDS]
    rewards_before = [r["reward_mean"] for r in before if "reward_mean" in r]
    figures = {
        name: _mean([(r.get("quality") or {}).get(key) for r in last])
        for name, key in _FIGURES.items()
    }
    closed = _mean([r.get("closed") for r in last])
    return Recent(
        len(last),
        closed=closed,
        # Records of practice steps have neither peers nor a reward.
        alone=_mean([float(not r["peers_heard"]) for r in last if "peers_heard" in r]),
        reward=_mean([r.get("reward_mean") for r in last]),
        reward_before=_mean(rewards_before) if len(rewards_before) >= ENOUGH_BEFORE else None,
        seconds_by=_seconds_by(last),
        **figures,
    )


def _seconds_by(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean seconds of each activity, over the rounds in which they were measured."""
    measured = [r["seconds_by"] for r in rounds if r.get("seconds_by")]
    total: dict[str, float] = {}
    for activity, seconds in chain.from_iterable(each.items() for each in measured):
        total[activity] = total.get(activity, 0.0) + seconds
    return {activity: seconds / len(measured) for activity, seconds in total.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    # A failed step has figures that are not finite; they would make the mean useless.
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _of_recent(name: str) -> Callable[[NodeStatus], float | None]:
    def measure(node: NodeStatus) -> float | None:
        found = node.condition.recent
        value: float | None = getattr(found, name)
        return value if found.rounds >= ENOUGH_ROUNDS else None

    return measure


def _of_swarm(count: Callable[[SwarmStatus], float]) -> Callable[[NodeStatus], float | None]:
    def measure(node: NodeStatus) -> float | None:
        return None if node.swarm is None else float(count(node.swarm))

    return measure


def _share(
    name: str,
    words: str,
) -> Callable[[NodeStatus], str]:
    def show(node: NodeStatus) -> str:
        found = node.condition.recent
        value = getattr(found, name)
        return "not known yet" if value is None else f"{value:.0%} {words}{_over(found.rounds)}"

    return show


def _over(rounds: int) -> str:
    return f", over the last {rounds} rounds" if rounds > 1 else ", in the last round"


def _show_device(node: NodeStatus) -> str:
    unused = node.condition.unused_gpus
    return (node.device or "not known yet") + (
        f", and the driver lists {unused} GPUs" if unused else ""
    )


def _setbacks(of: str) -> Callable[[NodeStatus], float | None]:
    def measure(node: NodeStatus) -> float | None:
        return (
            None
            if node.condition.engine is None
            else float(len(node.condition.setbacks.get(of, ())))
        )

    return measure


def _with_setbacks(
    node: NodeStatus,
    shown: str | None,
    of: str,
) -> str:
    if shown is None:
        return "not known yet"
    return "; ".join([shown, *node.condition.setbacks.get(of, ())])


_REACH = {
    "direct": "direct",
    "relay": "through a relay",
    "unknown": "not known yet",
    "none": "no relay: others cannot reach this node; it still asks them",
}


def _show_reach(node: NodeStatus) -> str:
    if node.swarm is None:
        return "no swarm"
    return _REACH[node.swarm.reach]


def _show_bootnodes(node: NodeStatus) -> str:
    if node.swarm is None:
        return "no swarm"
    foreign = ", ".join(node.swarm.foreign_bootnodes)
    return f"{foreign} answers, but is not hivewright's" if foreign else "no foreign one is known"


def _alone(node: NodeStatus) -> float | None:
    return None if node.swarm is None else _of_recent("alone")(node)


def _show_alone(node: NodeStatus) -> str:
    found = node.condition.recent
    if node.swarm is None or found.alone is None:
        return "not known yet" if node.swarm is not None else "no swarm"
    return f"none answered in {found.alone:.0%} of the rounds{_over(found.rounds)}"


def _show_quarantine(node: NodeStatus) -> str:
    if node.swarm is None:
        return "no swarm"
    peers = node.swarm.quarantined
    if not peers:
        return "no peer is in quarantine"
    named = ", ".join(peers[:_MAX_NAMED]) + (" ..." if len(peers) > _MAX_NAMED else "")
    return f"{len(peers)} in quarantine for invalid groups: {named}"


def _chain_away(node: NodeStatus) -> float | None:
    return {"ok": 0.0, "unreachable": 1.0}.get(node.chain)


_CHAIN = {
    "none": "none: rounds are counted here",
    "unknown": "not known yet",
    "ok": "answers",
    "unreachable": "does not answer: the node practises, which earns nothing",
}


def _reward_share(node: NodeStatus) -> float | None:
    reward, before = _of_recent("reward")(node), node.condition.recent.reward_before
    if reward is None or before is None or before < _LEAST_REWARD:
        return None
    return reward / before


def _show_reward(node: NodeStatus) -> str:
    found = node.condition.recent
    if found.reward is None:
        return "not known yet"
    before = "" if found.reward_before is None else f"; before these {found.reward_before:.3f}"
    return f"mean {found.reward:.3f}{_over(found.rounds)}{before}"


def _clock(node: NodeStatus) -> float | None:
    offset = node.condition.clock_offset
    return None if offset is None else abs(offset)


def _show_clock(node: NodeStatus) -> str:
    offset = node.condition.clock_offset
    if offset is None:
        return "not compared"
    return f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the account service's"


def _show_gap(node: NodeStatus) -> str:
    gap = node.condition.recent.sampling_gap
    if gap is None:
        return "not known yet"
    return f"{gap:.2g} nats apart from the trainer{_over(node.condition.recent.rounds)}"


def _waiting(node: NodeStatus) -> float | None:
    ledger = node.ledger
    if not ledger:
        return None
    settled = sum(ledger.get(name, 0) for name in ("confirmed", "rejected", "held-back"))
    return float(ledger.get("earned", 0) - settled)


def _show_rewards(node: NodeStatus) -> str:
    waiting = _waiting(node)
    if waiting is None:
        return "none are earned"
    return f"{waiting:.0f} wait for the chain"


def _show_disk(node: NodeStatus) -> str:
    spare = node.condition.disk_spare_mb
    if spare is None:
        return "not known yet"
    than = f"{abs(spare)} MB {'more' if spare >= 0 else 'less'}"
    return f"{than} free than node.min_free_disk_mb"


def _show_ram(node: NodeStatus) -> str:
    available = node.condition.ram_available_mb
    return "not known yet" if available is None else f"{available} MB of this host are available"


def _show_answers(node: NodeStatus) -> str:
    share = node.condition.answers_share
    return "not known yet" if share is None else f"{share:.0%} of a round's are generated at once"


def _gpu(node: NodeStatus) -> float | None:
    card = node.condition.gpu
    if card is None:
        return None
    return 2.0 if card.is_ill else float(bool(card.problems))


def _show_gpu(node: NodeStatus) -> str:
    card = node.condition.gpu
    if card is None:
        return "no GPU, or its health is not known"
    figures = {"°C": card.temperature, "W": card.power, "MHz": card.clock}
    shown = ", ".join(f"{value:.0f} {unit}" for unit, value in figures.items() if value is not None)
    return "; ".join([f"{card.name or card.bus_id} {shown}".strip(), *map(str, card.problems)])


def _training_share(node: NodeStatus) -> float | None:
    share = node.condition.training_share
    return None if share is None else share / (2 if node.condition.recomputes else 1)


def _show_training(node: NodeStatus) -> str:
    tokens, share = node.condition.training_tokens, node.condition.training_share
    if tokens is None or share is None:
        return "not known yet"
    again = ", layers computed again" if node.condition.recomputes else ""
    return f"{tokens} tokens at once, {share:.0%} of what was measured to fit{again}"


def _show_form(node: NodeStatus) -> str:
    asked = f"form {node.form}, {node.condition.template}" if node.form else "not known yet"
    closed = node.condition.recent.closed
    return (
        asked
        if closed is None
        else f"{asked}, {_share('closed', 'of the answers closed their tag')(node)}"
    )


CHECKS = (
    Check(
        name="device",
        metric="unused_gpus",
        what="GPUs that the driver lists while the model is on the CPU",
        unit="GPUs",
        measure=lambda node: None if node.device is None else float(node.condition.unused_gpus),
        show=_show_device,
        warn=0,
        advice=(
            "torch does not use them: `hivewright doctor` shows why; or set model.device to cpu"
            " if that is intended"
        ),
        severe=0,
    ),
    Check(
        name="precision",
        metric="precision_setbacks",
        what="reasons why answers are computed in another precision than set",
        unit="",
        measure=_setbacks("precision"),
        show=lambda node: _with_setbacks(node, node.condition.precision, "precision"),
        warn=0,
        advice="free memory if that is the reason given, else set generation.dtype to float32",
    ),
    Check(
        name="engine",
        metric="engine_setbacks",
        what="reasons why a faster way to generate is not used",
        unit="",
        measure=_setbacks("engine"),
        show=lambda node: _with_setbacks(node, node.condition.engine, "engine"),
        warn=0,
        advice="fix the reason given; answers are the same, but slower",
    ),
    Check(
        name="truncated",
        metric="truncated_share",
        what="share of our answers that reached generation.max_completion_length",
        unit="",
        measure=_of_recent("truncated"),
        show=_share("truncated", "of the answers were cut off"),
        warn=0.5,
        advice=(
            "raise generation.max_completion_length, or set generation.thinking to off for a"
            " model that thinks"
        ),
        severe=0.95,
    ),
    Check(
        name="no-signal",
        metric="no_signal_share",
        what="share of our groups whose answers all earn the same",
        unit="",
        measure=_of_recent("no_signal"),
        show=_share("no_signal", "of the groups teach nothing"),
        warn=0.9,
        advice=(
            "name tasks of another level in environment.families (level: auto), or another"
            " model in model.name"
        ),
        severe=0.995,
    ),
    Check(
        name="reward",
        metric="reward_share_of_before",
        what="mean reward of the last rounds, as a share of that of the rounds before",
        unit="",
        measure=_reward_share,
        show=_show_reward,
        warn=0.5,
        advice=(
            "see in `hivewright answers` what the model writes now, and in `hivewright report`"
            " entropy, clip ratio and truncated share; unless a level has risen, stop it and lower"
            " trainer.learning_rate"
        ),
        severe=0.1,
        is_low=True,
    ),
    Check(
        name="peers",
        metric="alone_share",
        what="share of our rounds in which no peer answered",
        unit="",
        measure=_alone,
        show=_show_alone,
        warn=0.99,
        advice=(
            "it trains alone and joins again by itself; if others run, `hivewright doctor` tries"
            " the bootnodes: open swarm.port, or correct swarm.bootnodes"
        ),
    ),
    Check(
        name="quarantine",
        metric="quarantined_peers",
        what="peers that sent invalid groups again and again, and are not asked for a while",
        unit="",
        measure=_of_swarm(lambda swarm: len(swarm.quarantined)),
        show=_show_quarantine,
        warn=0,
        advice=(
            "nothing is lost, their groups do not count; if such a peer is yours, upgrade it; the"
            " log has each reason (`groups rejected`)"
        ),
    ),
    Check(
        name="chain",
        metric="chain_unreachable",
        what="1: the chain does not answer",
        unit="",
        measure=_chain_away,
        show=lambda node: _CHAIN[node.chain],
        warn=0,
        advice=(
            "nothing is lost; `hivewright doctor` shows what this host can't reach: start chain and"
            " account service, or correct chain.account_url"
        ),
    ),
    Check(
        name="reachability",
        metric="unreachable",
        what="1: others cannot connect to this node, not even through a relay",
        unit="",
        measure=_of_swarm(lambda swarm: swarm.reach == "none"),
        show=_show_reach,
        warn=0,
        advice="name relays in swarm.relays, or open swarm.port",
    ),
    Check(
        name="bootnodes",
        metric="foreign_bootnodes",
        what="bootnodes that answer and do not speak hivewright's protocol",
        unit="",
        measure=_of_swarm(lambda swarm: len(swarm.foreign_bootnodes)),
        show=_show_bootnodes,
        warn=0,
        advice="no peers are found through it: remove it, or name another in swarm.bootnodes",
    ),
    Check(
        name="clock",
        metric="clock_offset_seconds",
        what="difference of this clock from the account service's",
        unit="s",
        measure=_clock,
        show=_show_clock,
        warn=3,
        advice="let NTP set both: `timedatectl set-ntp true`",
        severe=60,
    ),
    Check(
        name="sampler",
        metric="sampling_gap_nats",
        what="how far a token's log-probability differs between trainer and sampler",
        unit="nats",
        measure=_of_recent("sampling_gap"),
        show=_show_gap,
        warn=0.1,
        advice=(
            "set generation.dtype to float32, or generation.engine to torch; see which engine"
            " samples"
        ),
        severe=0.5,
    ),
    Check(
        name="rewards",
        metric="rewards_waiting",
        what="rewards that are due and not on the chain yet",
        unit="",
        measure=_waiting,
        show=_show_rewards,
        warn=10,
        advice="nothing is lost; check that the chain and the account service answer",
        severe=100,
    ),
    Check(
        name="disk",
        metric="disk_spare_mb",
        what="free disk beyond node.min_free_disk_mb",
        unit="MB",
        measure=lambda node: node.condition.disk_spare_mb,
        show=_show_disk,
        warn=1000,
        advice=(
            "make room, or lower node.keep_checkpoints: below node.min_free_disk_mb the node"
            " does not start again"
        ),
        severe=0,
        is_low=True,
    ),
    Check(
        name="ram",
        metric="ram_available_mb",
        what="available memory of the host",
        unit="MB",
        measure=lambda node: node.condition.ram_available_mb,
        show=_show_ram,
        warn=host_memory.LOW_MB,
        advice=f"the kernel soon ends programs to make room: {host_memory.MORE_ROOM}",
        severe=host_memory.TOO_LOW_MB,
        is_low=True,
    ),
    Check(
        name="pressure",
        metric="memory_stalled_share",
        what="share of the last minute in which programs of the host waited for memory",
        unit="",
        measure=lambda node: node.condition.memory_stalled,
        show=lambda node: host_memory.show_stalled(node.condition.memory_stalled),
        warn=host_memory.STALLED,
        advice=host_memory.LESS_USE,
        severe=host_memory.STALLED_BADLY,
    ),
    Check(
        name="gpu",
        metric="gpu_fault_level",
        what="0: the GPU is well, 1: it has a problem (throttled, few lanes), 2: it must not train",
        unit="",
        measure=_gpu,
        show=_show_gpu,
        warn=0,
        advice="a worker on a card with a severe problem stops until it is fixed",
        severe=1,
    ),
    Check(
        name="answers",
        metric="answers_at_once_share",
        what="share of a round's answers that memory takes at once",
        unit="",
        measure=lambda node: node.condition.answers_share,
        show=_show_answers,
        warn=0.5,
        advice=(
            "end other programs that use this memory, or lower generation.num_generations or"
            " generation.max_completion_length; answers are the same, slower"
        ),
        is_low=True,
    ),
    Check(
        name="training",
        metric="training_at_once_share",
        what="share of the measured micro-batch that memory takes now",
        unit="",
        measure=_training_share,
        show=_show_training,
        warn=0.9,
        advice=(
            "end other programs that use this memory; steps are the same, slower, and it rises"
            " again by itself"
        ),
        is_low=True,
    ),
    Check(
        name="form",
        metric="closed_share",
        what="share of our answers that closed their <answer> tag",
        unit="",
        measure=_of_recent("closed"),
        show=_show_form,
        warn=0.5,
        advice="try another generation.form, or a model in model.name that follows instructions",
        severe=0.02,
        is_low=True,
    ),
)
BY_NAME = {check.name: check for check in CHECKS}


def table() -> str:
    """Return the checks as the table in docs/operations/watch.md."""
    rows = [
        "| status line | metric | what it measures | warning | severe | what to do |",
        "| --- " * 6 + "|",
    ]
    for check in CHECKS:
        severe = "" if check.severe is None else check.bounds(check.severe)
        cells = (
            check.name,
            f"`hivewright_{check.metric}`",
            check.what,
            check.bounds(check.warn),
            severe,
            check.advice,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)

"""Health checks, for what may get worse while a node goes on: one table of checks.

Status, metrics, log, fleet status and the table in docs/operations/watch.md all derive from it. A
check measures one number of a node's status. Past its threshold it is a warning: logged once when
it is crossed, shown until it is good again, which is logged once, too.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.log import discreet, printable
from worker.telemetry.status import Finding, NodeStatus, Recent

log = logging.getLogger(__name__)

RECENT_ROUNDS = 8
"""Shares are judged over this many rounds, from ENOUGH_ROUNDS on: a single one is noise."""
ENOUGH_ROUNDS = 4
_RELIEF = 0.1
"""A warning ends when its number is better than the threshold by this share of it: no flicker."""
_FIGURES = {
    "truncated": "completions_clipped_ratio",
    "no_signal": "frac_reward_zero_std",
    "sampling_gap": "sampling_logp_difference_mean",
}
"""Of `Recent`, those that are averages of a step's figures (records.StepQuality)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that may get worse.

    `name`: in status, log and metrics. `metric`: the number's own, after "hivewright_". `what`:
    what it measures. `measure`: the number; None: not known, or no such thing here. `show`: for
    people. `warn`, `severe`: from beyond these on it is a warning, and a severe one; `is_low`:
    beyond is below. `advice`: what to do.
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

    def is_past(self, value: float, threshold: float | None) -> bool:
        if threshold is None:
            return False
        return value < threshold if self.is_low else value > threshold

    def relieved(self, threshold: float) -> float:
        """Return the threshold that a warning which is on is judged by."""
        return threshold + (1 if self.is_low else -1) * _RELIEF * abs(threshold)

    def bounds(self, threshold: float) -> str:
        return f"{'below' if self.is_low else 'above'} {threshold:g}{self.unit and ' ' + self.unit}"


def find(node: NodeStatus, active: Collection[str] = ()) -> tuple[Finding, ...]:
    """Return what is past its threshold. `active`: names of the checks that were so before."""
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
    """Bring the node's warnings up to date; log those that are new or severe now, or over."""
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
    last = list(rounds)[-RECENT_ROUNDS:]
    figures = {
        name: _mean([(r.get("quality") or {}).get(key) for r in last])
        for name, key in _FIGURES.items()
    }
    return Recent(len(last), closed=_mean([r.get("closed") for r in last]), **figures)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _of_recent(name: str) -> Callable[[NodeStatus], float | None]:
    def measure(node: NodeStatus) -> float | None:
        found = node.condition.recent
        value: float | None = getattr(found, name)
        return value if found.rounds >= ENOUGH_ROUNDS else None

    return measure


def _share(name: str, words: str) -> Callable[[NodeStatus], str]:
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


def _with_setbacks(node: NodeStatus, shown: str | None, of: str) -> str:
    if shown is None:
        return "not known yet"
    return "; ".join([shown, *node.condition.setbacks.get(of, ())])


def _show_precision(node: NodeStatus) -> str:
    return _with_setbacks(node, node.condition.precision, "precision")


def _show_engine(node: NodeStatus) -> str:
    return _with_setbacks(node, node.condition.engine, "engine")


def _unreachable(node: NodeStatus) -> float | None:
    return None if node.swarm is None else float(node.swarm.reach == "none")


def _show_reach(node: NodeStatus) -> str:
    if node.swarm is None:
        return "no swarm"
    return {
        "direct": "direct", "relay": "through a relay", "unknown": "not known yet",
        "none": "no relay: others cannot reach this node; it still asks them",
    }[node.swarm.reach]  # fmt: skip


def _foreign(node: NodeStatus) -> float | None:
    return None if node.swarm is None else float(len(node.swarm.foreign_bootnodes))


def _show_bootnodes(node: NodeStatus) -> str:
    if node.swarm is None:
        return "no swarm"
    foreign = ", ".join(node.swarm.foreign_bootnodes)
    return f"{foreign} answers, but is not hivewright's" if foreign else "no foreign one is known"


def _clock(node: NodeStatus) -> float | None:
    offset = node.condition.clock_offset
    return None if offset is None else abs(offset)


def _show_clock(node: NodeStatus) -> str:
    offset = node.condition.clock_offset
    if offset is None:
        return "compared with nobody's"
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


def _disk(node: NodeStatus) -> float | None:
    return node.condition.disk_spare_mb


def _show_disk(node: NodeStatus) -> str:
    spare = node.condition.disk_spare_mb
    if spare is None:
        return "not known yet"
    than = f"{abs(spare)} MB {'more' if spare >= 0 else 'less'}"
    return f"{than} free than node.min_free_disk_mb"


def _show_answers(node: NodeStatus) -> str:
    share = node.condition.answers_share
    return "not known yet" if share is None else f"{share:.0%} of a round's are generated at once"


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
        "device", "unused_gpus", "GPUs that the driver lists while the model is on the CPU", "GPUs",
        lambda node: None if node.device is None else float(node.condition.unused_gpus), _show_device, 0,
        "torch does not use them: `hivewright doctor` says why; or set model.device to cpu if that is meant",
        severe=0,
    ),
    Check(
        "precision", "precision_setbacks", "reasons why answers are computed in another precision than set", "",
        _setbacks("precision"), _show_precision, 0,
        "free memory if it says that it is short, else set generation.dtype to float32",
    ),
    Check(
        "engine", "engine_setbacks", "reasons why a faster way to generate is not used", "",
        _setbacks("engine"), _show_engine, 0,
        "remove the cause that it names; answers are the same, slower",
    ),
    Check(
        "truncated", "truncated_share", "share of our answers that were cut off", "",
        _of_recent("truncated"), _share("truncated", "of the answers were cut off"), 0.5,
        "raise generation.max_completion_length, or set generation.thinking to off for a model that thinks",
        severe=0.95,
    ),
    Check(
        "no-signal", "no_signal_share", "share of our groups whose answers all earn the same", "",
        _of_recent("no_signal"), _share("no_signal", "of the groups teach nothing"), 0.9,
        "name tasks of another level in environment.families (level: auto), or another model in model.name",
        severe=0.995,
    ),
    Check(
        "reachability", "unreachable", "1: others cannot connect to this node, not even through a relay", "",
        _unreachable, _show_reach, 0, "name relays in swarm.relays, or open swarm.port",
    ),
    Check(
        "bootnodes", "foreign_bootnodes", "bootnodes that answer and do not speak hivewright's protocol", "",
        _foreign, _show_bootnodes, 0, "nobody is found through it: take it out, or name another in swarm.bootnodes",
    ),
    Check(
        "clock", "clock_offset_seconds", "difference of this clock from the account service's", "s",
        _clock, _show_clock, 3, "let NTP set both: `timedatectl set-ntp true`", severe=60,
    ),
    Check(
        "sampler", "sampling_gap_nats", "how far a token's log-probability differs between trainer and sampler", "nats",
        _of_recent("sampling_gap"), _show_gap, 0.1,
        "set generation.dtype to float32, or generation.engine to torch; see which engine samples",
        severe=0.5,
    ),
    Check(
        "rewards", "rewards_waiting", "rewards that are due and not on the chain yet", "",
        _waiting, _show_rewards, 10, "nothing is lost; see that the chain and the account service answer",
        severe=100,
    ),
    Check(
        "disk", "disk_spare_mb", "free disk beyond node.min_free_disk_mb", "MB",
        _disk, _show_disk, 1000,
        "make room, or lower node.keep_checkpoints: below node.min_free_disk_mb the node does not start again",
        severe=0, is_low=True,
    ),
    Check(
        "answers", "answers_at_once_share", "share of a round's answers that memory takes at once", "",
        lambda node: node.condition.answers_share, _show_answers, 0.5,
        "end other programs that use this memory, or lower generation.num_generations or "
        "generation.max_completion_length; answers are the same, slower",
        is_low=True,
    ),
    Check(
        "training", "training_at_once_share", "share of the measured micro-batch that memory takes now", "",
        _training_share, _show_training, 0.9,
        "end other programs that use this memory; steps are the same, slower, and it rises again by itself",
        is_low=True,
    ),
    Check(
        "form", "closed_share", "share of our answers that closed their <answer> tag", "",
        _of_recent("closed"), _show_form, 0.5,
        "try another generation.form, or a model in model.name that follows instructions",
        severe=0.02, is_low=True,
    ),
)  # fmt: skip
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

"""Convert a node's status to metrics in Prometheus's text format.

`hivewright status --metrics` prints it.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker.log import printable
from worker.records import BetState
from worker.runtime.gpu_health import Card
from worker.swarm.status import SwarmStatus
from worker.telemetry import health
from worker.telemetry.status import NodeState, NodeStatus, RoundRecord

STEP_FIGURES = {
    "clip_ratio": "share of tokens whose ratio was clipped",
    "clip_ratio_low_mean": "share of tokens whose ratio was clipped at the lower bound",
    "clip_ratio_high_mean": "share of tokens whose ratio was clipped at the upper bound",
    "sampling_importance_sampling_ratio_min": "smallest ratio between trainer and sampler",
    "sampling_importance_sampling_ratio_mean": "mean ratio between trainer and sampler",
    "sampling_importance_sampling_ratio_max": "largest ratio between trainer and sampler",
    "sampling_logp_difference_mean": "mean difference of log-probabilities to the sampler, in nats",
    "sampling_logp_difference_max": "largest difference of log-probabilities, in nats",
    "sampling_kl": "KL divergence of the sampler from the trainer, in nats",
    "entropy": "mean entropy of the distributions of the trained tokens, in nats",
    "completions_mean_length": "mean length of answers, in tokens",
    "completions_p10_length": "length that a tenth of the answers do not reach, in tokens",
    "completions_p90_length": "length that nine tenths of the answers do not reach, in tokens",
    "completions_max_length": "largest length of an answer, in tokens",
    "completions_clipped_ratio": "share of answers that were cut off",
    "frac_reward_zero_std": "share of groups without a signal",
    "reward_std": "standard deviation of rewards",
}
"""Help of each figure of a training step (`records.StepQuality`)."""


@dataclass(frozen=True, slots=True)
class _Figure:
    """A metric: `values` by the values of its `labels`; the label `node` is added.

    `name`: without "hivewright_"; it is a counter if it ends in "_total", else a gauge.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], float]


def render(node: NodeStatus) -> str:
    """Return all known figures of the node. Ends in a line feed."""
    text: bytes = generate_latest(NodeCollector(node))
    return text.decode()


class NodeCollector:
    """A collector for prometheus_client with one node's figures, without the unknown ones."""

    def __init__(self, node: NodeStatus) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        figures = [*_of_node(self._node), *_of_health(self._node)]
        if self._node.last_round is not None:
            figures += _of_round(self._node.last_round)
        if self._node.swarm is not None:
            figures += _of_swarm(self._node.swarm)
        for figure in figures:
            if figure.values:
                yield self._metric(figure)

    def _metric(self, figure: _Figure) -> Metric:
        is_counter = figure.name.endswith("_total")
        family = CounterMetricFamily if is_counter else GaugeMetricFamily
        labels = ("node", *figure.labels)
        metric = family(f"hivewright_{figure.name}", figure.help, labels=labels)
        for key, value in sorted(figure.values.items()):
            # Prometheus allows control characters in a label; in a terminal they could do harm.
            texts = [printable(text) for text in (self._node.name, *key)]
            metric.add_metric(texts, float(value))
        return metric


def _one(
    name: str,
    help: str,
    value: float | None,
) -> _Figure:
    return _Figure(name, help, (), {} if value is None else {(): value})


def _by(
    name: str,
    help: str,
    label: str,
    values: Mapping[str, float],
) -> _Figure:
    return _Figure(name, help, (label,), {(key,): value for key, value in values.items()})


def _of_node(node: NodeStatus) -> list[_Figure]:
    states = {state: float(state == node.state) for state in get_args(NodeState)}
    peers = {node.peer_id: 1.0} if node.peer_id else {}
    devices = {} if node.device is None else {node.device: 1.0}
    groups = {"local": node.groups_local, "external": node.groups_external}
    updated = "When the node last wrote its status (Unix time)."
    speed = "Speed of generation in the last round."
    ledger = "Rewards in the ledger, by what became of them."
    brier = "Mean Brier score of the model in the prediction market: 0 (best) to 2."
    bets = {state: count for state, count in node.market.items() if state in get_args(BetState)}
    return [
        _by("state", "1: the state that the node is in.", "state", states),
        _by("peer_info", "1: the peer id of the node.", "peer_id", peers),
        _by("device_info", "1: the device that the model computes on.", "device", devices),
        _one("status_time_seconds", updated, node.updated_at),
        _one("round", "The newest round.", node.round),
        _one("rounds_trained_total", "Rounds trained.", node.rounds_trained),
        _one("reward_mean", "Mean reward of the last round's own groups.", node.reward_mean),
        _one("round_seconds", "How long the last round took.", node.round_seconds),
        _one("tokens_per_second", speed, node.tokens_per_second),
        _by("groups_trained", "Groups that the last round trained on.", "source", groups),
        _by("ledger", ledger, "state", node.ledger),
        _by("market_bets", "Bets in the prediction market, by state.", "state", bets),
        _by("market_brier", brier, "family", node.market_brier),
        *_of_card(node.condition.gpu),
    ]


def _of_card(card: Card | None) -> list[_Figure]:
    of = card or Card("")
    throttled = dict.fromkeys(of.throttled_by, 1.0)
    return [
        _one("gpu_temperature_celsius", "Temperature of the card.", of.temperature),
        _one("gpu_power_watts", "Power that the card draws.", of.power),
        _one("gpu_power_limit_watts", "Power limit of the card.", of.power_limit),
        _one("gpu_clock_mhz", "Clock of the card's multiprocessors.", of.clock),
        _one("gpu_max_clock_mhz", "Highest clock of the multiprocessors.", of.max_clock),
        _by("gpu_throttled", "1: the clock is lowered for this reason.", "reason", throttled),
        _one("gpu_ecc_uncorrected", "Uncorrectable memory errors since start.", of.ecc_uncorrected),
        _one("gpu_remapped_rows", "Memory rows remapped after such errors.", of.remapped_rows),
        _one("gpu_pcie_lanes", "PCIe lanes in use.", of.pcie_width),
    ]


def _of_round(record: RoundRecord) -> list[_Figure]:
    rewards: dict[tuple[str, ...], float] = {}
    deviations: dict[tuple[str, ...], float] = {}
    no_signal: dict[tuple[str, ...], float] = {}
    for family in record.families:
        key = family.family, "" if family.level is None else str(family.level)
        rewards[key], deviations[key] = family.reward, family.reward_std
        no_signal[key] = family.frac_reward_zero_std
    by = ("family", "level")
    return [
        *(
            _one(name, f"Last round: {what}.", record.quality.get(name))
            for name, what in STEP_FIGURES.items()
        ),
        _one("loss", "Last round: loss.", record.loss),
        _one("grad_norm", "Last round: norm of the gradient, before clipping.", record.grad_norm),
        _one("learning_rate", "Last round: learning rate.", record.learning_rate),
        _one("external_share", "Last round: share of peers' groups.", record.external_share),
        _by(
            "round_activity_seconds", "Last round: time by activity.", "activity", record.seconds_by
        ),
        _one("round_closed_share", "Last round: share of closed answer tags.", record.closed),
        _one("round_finished_time_seconds", "End of the last round (Unix).", record.finished_at),
        _one("held_out_reward", "Mean reward of the last evaluation.", record.held_out),
        _by(
            "round_groups_rejected", "Last round: invalid groups.", "reason", record.groups_rejected
        ),
        _by(
            "round_groups_dropped", "Last round: groups left out.", "reason", record.groups_dropped
        ),
        _Figure("family_reward_mean", "Last round: mean reward of a family.", by, rewards),
        _Figure("family_reward_std", "Last round: its standard deviation.", by, deviations),
        _Figure("family_no_signal_share", "Last round: groups without signal.", by, no_signal),
    ]


def _of_health(node: NodeStatus) -> list[_Figure]:
    severities = {finding.check: finding.severity for finding in node.warnings}
    past: dict[tuple[str, ...], float] = {}
    for check in health.CHECKS:
        past[check.name, "warning"] = severities.get(check.name) == "warning"
        if check.severe is not None:
            past[check.name, "severe"] = severities.get(check.name) == "severe"
    computing = {
        "precision": node.condition.precision,
        "engine": node.condition.engine,
        "form": node.form,
        "template": node.condition.template,
    }
    known = {name: text for name, text in computing.items() if text is not None}
    values = {tuple(known.values()): 1.0} if known else {}
    figures = [
        _Figure("warning", "1: the check is past its threshold.", ("check", "severity"), past),
        _Figure("computing_info", "1: how the model is computed and asked.", tuple(known), values),
    ]
    for check in health.CHECKS:
        what = f"{check.what[0].upper()}{check.what[1:]}."
        figures.append(_one(check.metric, what, check.measure(node)))
    return figures


def _of_swarm(swarm: SwarmStatus) -> list[_Figure]:
    groups = {
        "offered": swarm.groups_offered,
        "fetched": swarm.groups_fetched,
        "verified": swarm.groups_verified,
        "handed-on": swarm.groups_handed_on,
    }
    age = None
    if swarm.newest_group_at is not None:
        age = max(0.0, time.time() - swarm.newest_group_at)
    quarantined: Mapping[tuple[str, ...], float] = {
        (peer, why): at for peer, (at, why) in swarm.quarantines.items()
    }
    last_quarantined = "When a peer was last quarantined (Unix time)."
    traffic = {"in": swarm.bytes_in, "out": swarm.bytes_out}
    heard = "Peers that answered in the last round."
    rejected = "Invalid groups that peers sent."
    refused, refused_by_peers = "Peers' requests refused.", "Our requests refused."
    versions = "Peers that run another version."
    unanswered = "Rounds without an answer of the exchange."
    return [
        _by("reach_info", "1: how others can connect to the node.", "reach", {swarm.reach: 1.0}),
        _one("peers_known", "Peers whose records are alive.", swarm.peers_known),
        _one("peers_heard", heard, len(swarm.peers_heard)),
        _by("groups_total", "Groups exchanged.", "what", groups),
        _by("groups_rejected_total", rejected, "reason", swarm.rejected),
        _Figure(
            "peer_quarantined_time_seconds", last_quarantined, ("peer_id", "reason"), quarantined
        ),
        _one("newest_group_age_seconds", "Age of the newest verified group of a peer.", age),
        _by("bytes_total", "Bytes of the exchange.", "direction", traffic),
        _by("requests_refused_total", refused, "reason", swarm.requests_refused),
        _by("refused_by_peers_total", refused_by_peers, "reason", swarm.refused_by_peers),
        _by("peers_of_other_versions", versions, "version", swarm.other_versions),
        _one("daemon_restarts_total", "Restarts of libp2p.", swarm.daemon_restarts),
        _one("rounds_unanswered_total", unanswered, swarm.rounds_unanswered),
    ]


def table() -> str:
    """Return the figures of a worker as the table in docs/operations/monitoring.md."""
    rows = ["| metric | labels | meaning |", "| --- " * 3 + "|"]
    node = NodeStatus("", "", "", "", "")
    figures = [*_of_node(node), *_of_health(node), *_of_round(_ANY_ROUND), *_of_swarm(_ANY_SWARM)]
    for figure in figures:
        labels = ", ".join(figure.labels)
        rows.append(f"| `hivewright_{figure.name}` | {labels} | {figure.help} |")
    return "\n".join(rows)


_ANY_ROUND = RoundRecord(0, 0, 0, 0, 0, (), 0, 0, {}, {}, 0, 0, None)
_ANY_SWARM = SwarmStatus("training-alone", "", 0)

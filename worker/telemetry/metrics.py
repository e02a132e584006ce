"""A node's status in Prometheus's text format, such as for node_exporter's textfiles.

`hivewright status --metrics` prints it.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker.log import printable
from worker.swarm.status import SwarmStatus
from worker.telemetry import health
from worker.telemetry.status import NodeState, NodeStatus


@dataclass(frozen=True, slots=True)
class _Figure:
    """A metric: its values by the values of its `labels`, besides the label `node`.

    `name`: without "hivewright_"; it is a counter if it ends in "_total", else a gauge.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], float]


def render(node: NodeStatus) -> str:
    """Return all known figures of the node. Ends in a line feed."""
    text: bytes = generate_latest(_NodeCollector(node))
    return text.decode()


class _NodeCollector:
    """A collector for prometheus_client with one node's figures, without the unknown ones."""

    def __init__(self, node: NodeStatus) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        figures = [*_of_node(self._node), *_of_health(self._node)]
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
            # Prometheus permits control characters in a label; in a terminal they could do harm.
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
    devices = {} if node.device is None else {node.device: 1.0}
    groups = {"local": node.groups_local, "external": node.groups_external}
    updated = "When the node last wrote its status (Unix time)."
    speed = "Speed of generation in the last round."
    ledger = "Rewards in the ledger, by what became of them."
    return [
        _by("state", "1: the state that the node is in.", "state", states),
        _by("device_info", "1: the device that the model computes on.", "device", devices),
        _one("status_time_seconds", updated, node.updated_at),
        _one("round", "The newest round.", node.round),
        _one("rounds_trained_total", "Rounds trained.", node.rounds_trained),
        _one("reward_mean", "Mean reward of the last round's own groups.", node.reward_mean),
        _one("round_seconds", "How long the last round took.", node.round_seconds),
        _one("tokens_per_second", speed, node.tokens_per_second),
        _by("groups_trained", "Groups that the last round trained on.", "source", groups),
        _by("ledger", ledger, "state", node.ledger),
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
        _one("newest_group_age_seconds", "Age of the newest verified group of a peer.", age),
        _by("bytes_total", "Bytes of the exchange.", "direction", traffic),
        _by("requests_refused_total", refused, "reason", swarm.requests_refused),
        _by("refused_by_peers_total", refused_by_peers, "reason", swarm.refused_by_peers),
        _by("peers_of_other_versions", versions, "version", swarm.other_versions),
        _one("daemon_restarts_total", "Restarts of libp2p.", swarm.daemon_restarts),
        _one("rounds_unanswered_total", unanswered, swarm.rounds_unanswered),
    ]

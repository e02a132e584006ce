"""A node's status in Prometheus's text format, such as for node_exporter's textfiles.

`hivewright status --metrics` prints it.
"""

import time
from collections.abc import Iterable, Mapping
from typing import get_args

from worker.log import printable
from worker.swarm.status import SwarmStatus
from worker.telemetry import health
from worker.telemetry.status import NodeState, NodeStatus

_Sample = tuple[Mapping[str, str], float]


def render(node: NodeStatus) -> str:
    """Return all known figures of the node. Ends in a line feed."""
    lines: list[str] = []

    def add(name: str, kind: str, help: str, samples: Iterable[_Sample]) -> None:
        found = [
            f"hivewright_{name}{_labels({'node': node.name, **labels})} {value}"
            for labels, value in samples
        ]
        if found:
            lines.extend(
                [f"# HELP hivewright_{name} {help}", f"# TYPE hivewright_{name} {kind}", *found]
            )

    add("state", "gauge", "1: the state that the node is in.", _one_of(node.state))
    devices = [] if node.device is None else [({"device": node.device}, 1.0)]
    add("device_info", "gauge", "1: the device that the model computes on.", devices)
    add(
        "status_time_seconds",
        "gauge",
        "When the node last said so (Unix time).",
        _one(node.updated_at),
    )
    add("round", "gauge", "The newest round.", _one(node.round))
    add("rounds_trained_total", "counter", "Rounds trained.", _one(node.rounds_trained))
    add(
        "reward_mean",
        "gauge",
        "Mean reward of the last round's own groups.",
        _one(node.reward_mean),
    )
    add("round_seconds", "gauge", "How long the last round took.", _one(node.round_seconds))
    add(
        "tokens_per_second",
        "gauge",
        "Speed of generation in the last round.",
        _one(node.tokens_per_second),
    )
    groups = {"local": node.groups_local, "external": node.groups_external}
    add("groups_trained", "gauge", "Groups that the last round trained on.", _by("source", groups))
    add(
        "ledger",
        "gauge",
        "Rewards in the ledger, by what became of them.",
        _by("state", node.ledger),
    )
    for name, kind, help, samples in _of_health(node):
        add(name, kind, help, samples)
    if node.swarm is not None:
        for name, kind, help, samples in _of_swarm(node.swarm):
            add(name, kind, help, samples)
    return "".join(f"{line}\n" for line in lines)


def _of_health(node: NodeStatus) -> list[tuple[str, str, str, list[_Sample]]]:
    condition = node.condition
    info = {
        "precision": condition.precision,
        "engine": condition.engine,
        "form": node.form,
        "template": condition.template,
    }
    labels = {name: text for name, text in info.items() if text is not None}
    computing: list[_Sample] = [(labels, 1.0)] if labels else []
    severities = {finding.check: finding.severity for finding in node.warnings}
    past: list[_Sample] = [
        ({"check": check.name, "severity": severity}, float(severities.get(check.name) == severity))
        for check in health.CHECKS
        for severity in (("warning",) if check.severe is None else ("warning", "severe"))
    ]
    figures = [(c.metric, "gauge", _sentence(c.what), _one(c.measure(node))) for c in health.CHECKS]
    return [
        ("warning", "gauge", "1: the check is past its threshold.", past),
        ("computing_info", "gauge", "1: how the model is computed and asked.", computing),
        *figures,
    ]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _of_swarm(swarm: SwarmStatus) -> list[tuple[str, str, str, list[_Sample]]]:
    groups = {
        "offered": swarm.groups_offered,
        "fetched": swarm.groups_fetched,
        "verified": swarm.groups_verified,
        "handed-on": swarm.groups_handed_on,
    }
    newest = (
        None if swarm.newest_group_at is None else max(0.0, time.time() - swarm.newest_group_at)
    )
    traffic = {"in": swarm.bytes_in, "out": swarm.bytes_out}
    return [
        (
            "reach_info",
            "gauge",
            "1: how others can connect to the node.",
            [({"reach": swarm.reach}, 1.0)],
        ),
        ("peers_known", "gauge", "Peers whose records are alive.", _one(swarm.peers_known)),
        (
            "peers_heard",
            "gauge",
            "Peers that answered in the last round.",
            _one(len(swarm.peers_heard)),
        ),
        ("groups_total", "counter", "Groups exchanged.", _by("what", groups)),
        (
            "groups_rejected_total",
            "counter",
            "Invalid groups that peers sent.",
            _by("reason", swarm.rejected),
        ),
        (
            "newest_group_age_seconds",
            "gauge",
            "Age of the newest verified group of a peer.",
            _one(newest),
        ),
        ("bytes_total", "counter", "Bytes of the exchange.", _by("direction", traffic)),
        (
            "requests_refused_total",
            "counter",
            "Peers' requests refused.",
            _by("reason", swarm.requests_refused),
        ),
        (
            "refused_by_peers_total",
            "counter",
            "Our requests refused.",
            _by("reason", swarm.refused_by_peers),
        ),
        (
            "peers_of_other_versions",
            "gauge",
            "Peers that run another version.",
            _by("version", swarm.other_versions),
        ),
        (
            "daemon_restarts_total",
            "counter",
            "Restarts of libp2p.",
            _one(swarm.daemon_restarts),
        ),
        (
            "rounds_unanswered_total",
            "counter",
            "Rounds without an answer of the exchange.",
            _one(swarm.rounds_unanswered),
        ),
    ]


def _one(value: float | None) -> list[_Sample]:
    return [] if value is None else [({}, value)]


def _by(label: str, values: Mapping[str, float]) -> list[_Sample]:
    return [({label: key}, value) for key, value in sorted(values.items())]


def _one_of(state: str) -> list[_Sample]:
    return [({"state": name}, float(name == state)) for name in get_args(NodeState)]


def _labels(labels: Mapping[str, str]) -> str:
    escaped = {
        key: printable(text).replace("\\", r"\\").replace('"', r"\"")
        for key, text in labels.items()
    }
    return "{" + ",".join(f'{key}="{text}"' for key, text in escaped.items()) + "}"

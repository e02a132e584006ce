"""The metrics are valid to Prometheus's own parser, for any text in a status."""

import re
import time

from worker.swarm.status import SwarmStatus
from worker.telemetry.metrics import render
from worker.telemetry.status import NodeStatus

LABEL = r'[a-z]+="(?:[^"\\\n]|\\\\|\\")*"'
SAMPLE = re.compile(rf"hivewright_[a-z_]+\{{{LABEL}(?:,{LABEL})*\}} -?[0-9.e+-]+")


def test_figures_of_the_exchange_are_in_prometheus_form() -> None:
    node = NodeStatus(
        'gpu "7"\n',
        "Qm",
        "quick brown otter",
        "hivewright/tiny",
        "0.1.0",
        state="catching-up",
        round=12,
    )
    node.swarm = SwarmStatus(
        "catching-up",
        "Qm",
        5,
        ("QmA", "QmB"),
        {"seed": 3, '\x1b"\n': 1},
        groups_fetched=40,
        groups_verified=36,
        bytes_in=1_234_567_890,
        newest_group_at=time.time() - 42,
        refused_by_peers={"not-allowed": 2},
    )
    text = render(node)
    lines = text.splitlines()
    assert all(
        line.startswith(("# HELP hivewright_", "# TYPE hivewright_")) or SAMPLE.fullmatch(line)
        for line in lines
    )
    assert text.endswith("\n")
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    samples = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"
    }
    me = r'node="gpu \"7\"\\n"'
    assert samples[f'hivewright_state{{{me},state="catching-up"}}'] == 1
    assert samples[f'hivewright_state{{{me},state="connected"}}'] == 0
    assert samples[f'hivewright_groups_total{{{me},what="verified"}}'] == 36
    assert samples[f'hivewright_groups_rejected_total{{{me},reason="seed"}}'] == 3
    assert samples[f'hivewright_bytes_total{{{me},direction="in"}}'] == 1_234_567_890
    assert samples[f'hivewright_refused_by_peers_total{{{me},reason="not-allowed"}}'] == 2
    assert 41 < samples[f"hivewright_newest_group_age_seconds{{{me}}}"] < 60


def test_node_without_a_swarm_has_no_figures_of_one() -> None:
    text = render(NodeStatus("a", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0"))
    assert "hivewright_peers_known" not in text
    assert "hivewright_round{" not in text
    assert 'hivewright_rounds_trained_total{node="a"} 0' in text

"""The metrics are valid to Prometheus's own parser, for any text in a status."""

import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from worker.records import StepQuality
from worker.swarm.status import SwarmStatus
from worker.telemetry import health
from worker.telemetry.metrics import STEP_FIGURES, render, table
from worker.telemetry.status import FamilyReward, Finding, NodeStatus, RoundRecord


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the value of each sample, by its name and its labels but `node`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "node"}
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    return samples_of(text)[f"hivewright_{name}", frozenset(labels.items())]


def make_node(**fields: object) -> NodeStatus:
    return NodeStatus("a", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", **fields)  # type: ignore[arg-type]


@pytest.fixture
def node() -> NodeStatus:
    node = make_node(state="catching-up", round=12)
    node.name = 'gpu "7"\n'
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
    return node


def test_figures_of_the_exchange_are_in_prometheus_form(node: NodeStatus) -> None:
    text = render(node)
    assert text.endswith("\n")
    assert value(text, "state", state="catching-up") == 1
    assert value(text, "state", state="connected") == 0
    assert value(text, "round") == 12
    assert value(text, "groups_total", what="verified") == 36
    assert value(text, "groups_rejected_total", reason="seed") == 3
    assert value(text, "bytes_total", direction="in") == 1_234_567_890
    assert value(text, "refused_by_peers_total", reason="not-allowed") == 2
    assert 41 < value(text, "newest_group_age_seconds") < 60


def test_bets_and_calibration_are_figures(node: NodeStatus) -> None:
    node.market = {"paid": 3, "lost": 1, "rated": 4, "brier": 0.5}
    node.market_brier = {"bf": 0.25}
    text = render(node)
    assert value(text, "market_bets", state="paid") == 3
    assert value(text, "market_brier", family="bf") == 0.25
    assert 'state="brier"' not in text  # only states of bets


def test_control_characters_of_peers_are_escaped(node: NodeStatus) -> None:
    text = render(node)
    assert text.replace("\n", "").isprintable()
    assert value(text, "groups_rejected_total", reason=r"\x1b" + '"' + r"\n") == 1
    names = {
        sample.labels["node"] for f in text_string_to_metric_families(text) for sample in f.samples
    }
    assert names == {r'gpu "7"' + r"\n"}


def test_metrics_have_their_type_and_help(node: NodeStatus) -> None:
    """The names are a contract with dashboards and alerts: a counter ends in _total."""
    lines = render(node).splitlines()
    types = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    assert types["hivewright_rounds_trained_total"] == "counter"
    assert types["hivewright_round"] == "gauge"
    for name, kind in types.items():
        assert (kind == "counter") == name.endswith("_total")
    helped = [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert helped == [*types]


def test_warning_of_a_check_is_a_metric() -> None:
    node = make_node()
    node.warnings = (Finding("clock", "severe", "61 s behind"),)
    text = render(node)
    assert value(text, "warning", check="clock", severity="severe") == 1
    assert value(text, "warning", check="clock", severity="warning") == 0
    shown = {dict(labels).get("check") for name, labels in samples_of(text) if "warning" in name}
    assert shown == {check.name for check in health.CHECKS}
    assert ("hivewright_warning", frozenset({("check", "engine"), ("severity", "severe")})) not in (
        samples_of(text)
    )


def test_node_without_a_swarm_has_no_figures_of_one() -> None:
    text = render(make_node())
    assert "hivewright_peers_known" not in text
    assert "hivewright_round{" not in text
    assert value(text, "rounds_trained_total") == 0


def test_figures_of_the_last_round_have_the_names_of_trl() -> None:
    node = make_node()
    node.last_round = RoundRecord(
        round=3,
        finished_at=1e9,
        reward_mean=0.5,
        loss=0.1,
        grad_norm=0.2,
        peers_heard=("QmA",),
        groups_local=4,
        groups_external=2,
        groups_rejected={"seed": 2},
        groups_dropped={},
        tokens_per_second=1.0,
        seconds=2.0,
        skipped=None,
        quality=asdict(StepQuality(entropy=1.5, clip_ratio_high_mean=0.25)),
        external_share=0.375,
        families=(FamilyReward("gcd", 2, 4, 0.75, 0.1, 0.5), FamilyReward("bf", None, 1, 0, 0, 1)),
        held_out=0.625,
    )
    text = render(node)
    assert value(text, "entropy") == 1.5
    assert value(text, "clip_ratio_high_mean") == 0.25
    assert "hivewright_sampling_kl" not in text
    assert value(text, "external_share") == 0.375
    assert value(text, "family_reward_mean", family="gcd", level="2") == 0.75
    assert value(text, "family_no_signal_share", family="bf", level="") == 1
    assert value(text, "round_groups_rejected", reason="seed") == 2
    assert value(text, "held_out_reward") == 0.625


def test_every_figure_of_a_step_has_a_description() -> None:
    assert set(STEP_FIGURES) == {field.name for field in fields(StepQuality)}


def test_documents_have_every_figure_with_its_meaning() -> None:
    page = Path(__file__).parents[2] / "docs/operations/monitoring.md"
    assert table() in page.read_text(), f"{page}: run `make docs`"

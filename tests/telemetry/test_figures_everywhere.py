"""Each figure that shows a collapse is in the history, the status, the metrics and the trackers.

The record is that of a real round; what needs peers or an evaluation is filled in.
"""

import dataclasses
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.test_node import enrolled, half_are_right, make_node
from worker.environments.mixture import Mix
from worker.telemetry import metrics, status
from worker.telemetry.tracking.figures import of_round

# By figure: its path in a line of rounds.jsonl, its metric, and its name in trackers.
FIGURES = {
    "reward": ("reward_mean", "reward_mean", "reward"),
    "reward's deviation": ("quality/reward_std", "reward_std", "reward_std"),
    "no signal": ("quality/frac_reward_zero_std", "frac_reward_zero_std", "frac_reward_zero_std"),
    "reward by family": ("families/0/reward", "family_reward_mean", "rewards/gcd/level_0/mean"),
    "its deviation": ("families/0/reward_std", "family_reward_std", "rewards/gcd/level_0/std"),
    "no signal by family": (
        "families/0/frac_reward_zero_std",
        "family_no_signal_share",
        "rewards/gcd/level_0/frac_reward_zero_std",
    ),
    "entropy": ("quality/entropy", "entropy", "entropy"),
    "mean length": (
        "quality/completions_mean_length",
        "completions_mean_length",
        "completions/mean_length",
    ),
    "p10": ("quality/completions_p10_length", "completions_p10_length", "completions/p10_length"),
    "p90": ("quality/completions_p90_length", "completions_p90_length", "completions/p90_length"),
    "largest": (
        "quality/completions_max_length",
        "completions_max_length",
        "completions/max_length",
    ),
    "truncated": (
        "quality/completions_clipped_ratio",
        "completions_clipped_ratio",
        "completions/clipped_ratio",
    ),
    "closed": ("closed", "round_closed_share", "completions/closed_ratio"),
    "clip low": ("quality/clip_ratio_low_mean", "clip_ratio_low_mean", "clip_ratio/low_mean"),
    "clip high": ("quality/clip_ratio_high_mean", "clip_ratio_high_mean", "clip_ratio/high_mean"),
    "KL": ("quality/sampling_kl", "sampling_kl", "sampling/kl"),
    "gradient": ("grad_norm", "grad_norm", "grad_norm"),
    "learning rate": ("learning_rate", "learning_rate", "learning_rate"),
    "external": ("external_share", "external_share", "swarm/external_share"),
    "rejected": ("groups_rejected/seed", "round_groups_rejected", "swarm/rejected/seed"),
    "generating": ("seconds_by/generating", "round_activity_seconds", "seconds/generating"),
    "exchanging": ("seconds_by/exchanging", "round_activity_seconds", "seconds/exchanging"),
    "scoring": ("seconds_by/scoring", "round_activity_seconds", "seconds/scoring"),
    "training": ("seconds_by/training", "round_activity_seconds", "seconds/training"),
    "waiting": ("seconds_by/waiting", "round_activity_seconds", "seconds/waiting"),
    "speed": ("tokens_per_second", "tokens_per_second", "speed/tokens_per_second"),
    "held out": ("held_out", "held_out_reward", "held_out/reward"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the status of a node that trained a round, with its last record completed."""
    folder = tmp_path_factory.mktemp("node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mix, "score", half_are_right)
        families = [{"name": "gcd", "level": 0}]
        node = make_node(enrolled(folder, environment_families=families))
        node._train_part(node._next_round())
        node.close()
    (line,) = (folder / "rounds.jsonl").read_text().splitlines()
    record = status.as_record(json.loads(line))
    record = dataclasses.replace(
        record,
        groups_rejected={"seed": 2},
        held_out=0.5,
        seconds_by={"exchanging": 0.0, "waiting": 0.0, **record.seconds_by},
    )
    found = status.read(folder)
    found.last_round = record
    return found


def at(line, path):
    for name in path.split("/"):
        line = line[int(name)] if isinstance(line, list | tuple) else line[name]
    return line


@pytest.mark.parametrize("figure", FIGURES)
def test_figure_is_in_history_status_metrics_and_trackers(trained, figure):
    path, metric, tracked = FIGURES[figure]
    value = at(dataclasses.asdict(trained.last_round), path)
    assert isinstance(value, float | int)
    samples = [
        sample
        for family in text_string_to_metric_families(metrics.render(trained))
        for sample in family.samples
        if sample.name == f"hivewright_{metric}"
    ]
    if "activity" in metric:
        samples = [each for each in samples if each.labels["activity"] == path.split("/")[1]]
    (sample,) = samples
    assert sample.value == pytest.approx(value)
    assert of_round(trained.last_round)[tracked] == pytest.approx(value)

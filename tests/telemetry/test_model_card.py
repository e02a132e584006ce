"""The model card: figures of a real history's form, and text that is safe in Markdown's header."""

from typing import Any

import pytest
import yaml

from worker import settings
from worker.telemetry.model_card import MEAN_OF, model_card
from worker.telemetry.status import NodeStatus


def blank(**changes: Any) -> NodeStatus:
    known = {"round": 7, "environments": ("reasoning-gym 0.1.24",)} | changes
    model = known.pop("model", "Qwen/Qwen2.5-0.5B-Instruct")
    return NodeStatus("gpu-1", "QmMe", "quick brown otter", model, "0.1.0", **known)


def line(reward: float, *peers: str) -> dict[str, Any]:
    counts = {"groups_local": 4, "groups_external": 2 * len(peers)}
    return {"reward_mean": reward, "peers_heard": peers, **counts}


def card(node: NodeStatus, rounds: list[dict[str, Any]], **flat: Any) -> str:
    return model_card(settings.from_flat(flat, "test"), node, rounds)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("hivewright/tiny", None),
        ("/srv/models/mine", None),
        ("./mine", None),
        ("a/b/c", None),
    ],
)
def test_header_names_a_base_model_only_if_the_hub_has_it(model: str, base: str | None) -> None:
    _, header, text = card(blank(model=model), []).split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata.get("base_model") == base
    assert metadata["library_name"] == "transformers"
    assert f"| model before | {model} |" in text


def test_means_are_of_the_first_and_the_last_rounds_and_each_peer_counts_once() -> None:
    rewards = [0.0] * MEAN_OF + [0.3] * 10 + [1.0] * MEAN_OF
    rounds = [line(reward, "QmA", "QmB") for reward in rewards]
    text = card(blank(rounds_trained=50, held_out_before=0.25, held_out_now=0.5), rounds)
    assert f"| mean reward | 1.000 (last {MEAN_OF} rounds), 0.000 in its first |" in text
    assert "| sum of rewards | 23.00 |" in text
    assert "| peers that it heard | 2 |" in text
    assert "| groups of answers | 200 of its own, 200 of its peers |" in text
    assert "| held-out reward | 0.500 now, 0.250 before training |" in text


def test_node_without_a_round_has_a_card_without_rewards() -> None:
    text = card(blank(), [])
    assert "mean reward" not in text
    assert "held-out" not in text
    assert "| groups of answers | 0 of its own, 0 of its peers |" in text


def test_shares_and_levels_of_families_are_those_of_the_run() -> None:
    families = [{"name": "gcd", "weight": 3}, {"name": "bf", "weight": 1, "level": 2}]
    text = card(blank(levels={"bf": 4}), [], environment_families=families)
    assert "| gcd | 75% | `default` | - |" in text
    assert "| bf | 25% | `default` | 4 |" in text

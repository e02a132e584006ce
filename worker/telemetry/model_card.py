"""The model card: the model's training data, duration, peers and rewards."""

import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from worker.settings import Settings
from worker.telemetry.status import NodeStatus

MEAN_OF = 20
"""Rounds over which the first and the latest rewards are averaged."""


def model_card(
    settings: Settings,
    node: NodeStatus,
    rounds: Sequence[dict[str, Any]],
) -> str:
    """Return Markdown with the Hub's metadata. `rounds` are the lines of rounds.jsonl."""
    return f"""---
{yaml.safe_dump(_metadata(node), sort_keys=False).strip()}
---

# {node.animal_name}, round {node.round}

A language model that was trained by one node of a hivewright swarm: it answers reasoning tasks,
shares its answers with its peers, and learns from its own and theirs by reinforcement (GRPO with
swarm sampling, [SAPO](https://arxiv.org/abs/2509.08721)).

| | |
| --- | --- |
| model before | {node.model} |
| node | {node.animal_name}, peer `{node.peer_id}` |
| hivewright | {node.version} |
{_progress(node, rounds)}

## Trained on

Tasks of {", ".join(node.environments)}; each answer was scored by the family's own scorer, 0 to 1.

| family | share | configuration | level |
| --- | --- | --- | --- |
{_families(settings, node)}

## How

{_method(settings)}
"""


def _metadata(node: NodeStatus) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hivewright", "grpo", "reinforcement-learning", "reasoning", node.animal_name],
    }
    is_local = node.model.startswith(("hivewright/", ".", "/", "~"))
    if node.model.count("/") == 1 and not is_local:
        metadata["base_model"] = node.model
    return metadata


def _progress(
    node: NodeStatus,
    rounds: Sequence[dict[str, Any]],
) -> str:
    rewards = [row["reward_mean"] for row in rounds]
    peers = {peer for row in rounds for peer in row["peers_heard"]}
    rows = {
        "rounds trained": str(node.rounds_trained),
        "peers that it heard": str(len(peers)),
        "groups of answers": (
            f"{sum(row['groups_local'] for row in rounds)} of its own, "
            f"{sum(row['groups_external'] for row in rounds)} of its peers"
        ),
    }
    if rewards:
        first = statistics.fmean(rewards[:MEAN_OF])
        last = statistics.fmean(rewards[-MEAN_OF:])
        rows["mean reward"] = (
            f"{last:.3f} (last {len(rewards[-MEAN_OF:])} rounds), {first:.3f} in its first"
        )
        rows["sum of rewards"] = f"{sum(rewards):.2f}"
    if node.held_out_before is not None and node.held_out_now is not None:
        rows["held-out reward"] = (
            f"{node.held_out_now:.3f} now, {node.held_out_before:.3f} before training"
        )
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _families(settings: Settings, node: NodeStatus) -> str:
    families = settings.environment.families
    total = sum(family.weight for family in families)
    return "\n".join(
        f"| {f.name} | {f.weight / total:.0%} | `{f.config or 'default'}` |"
        f" {node.levels.get(f.name, '-')} |"
        for f in families
    )


def _method(settings: Settings) -> str:
    trainer, generation = settings.trainer, settings.generation
    return (
        f"{settings.environment.tasks_per_round} tasks a round, {generation.num_generations}"
        f" answers each of at most {generation.max_completion_length} tokens at temperature"
        f" {generation.temperature:g}. Each step is on {trainer.local_groups} groups of its own and"
        f" {trainer.external_groups} of its peers; loss {trainer.loss_type}, clip range"
        f" {trainer.epsilon:g} to {trainer.epsilon_high or trainer.epsilon:g}, KL weight"
        f" {trainer.beta:g}, learning rate {trainer.learning_rate or 0:g}"
        f" ({trainer.lr_scheduler_type})."
    )

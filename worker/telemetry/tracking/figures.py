"""The figures of a round as trackers show them, with TRL's names."""

import math
from collections.abc import Iterator

from worker.telemetry.status import RoundRecord

# TRL writes "/" where a field of `records.StepQuality` has "_".
_STEP_NAMES = {
    "clip_ratio": "clip_ratio/region_mean",
    "clip_ratio_low_mean": "clip_ratio/low_mean",
    "clip_ratio_high_mean": "clip_ratio/high_mean",
    "sampling_importance_sampling_ratio_min": "sampling/importance_sampling_ratio/min",
    "sampling_importance_sampling_ratio_mean": "sampling/importance_sampling_ratio/mean",
    "sampling_importance_sampling_ratio_max": "sampling/importance_sampling_ratio/max",
    "sampling_logp_difference_mean": "sampling/sampling_logp_difference/mean",
    "sampling_logp_difference_max": "sampling/sampling_logp_difference/max",
    "sampling_kl": "sampling/kl",
    "completions_mean_length": "completions/mean_length",
    "completions_p10_length": "completions/p10_length",
    "completions_p90_length": "completions/p90_length",
    "completions_max_length": "completions/max_length",
    "completions_clipped_ratio": "completions/clipped_ratio",
}


def of_round(record: RoundRecord) -> dict[str, float]:
    """Return the finite figures of a round by name."""
    return {name: value for name, value in _all(record) if math.isfinite(value)}


def _all(record: RoundRecord) -> Iterator[tuple[str, float]]:
    known = {
        "reward": record.reward_mean,
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "completions/closed_ratio": record.closed,
        "held_out/reward": record.held_out,
        "swarm/external_share": record.external_share,
        "swarm/peers_heard": len(record.peers_heard),
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/round_seconds": record.seconds,
    }
    known |= {_STEP_NAMES.get(name, name): value for name, value in record.quality.items()}
    yield from ((name, value) for name, value in known.items() if value is not None)
    for reason, count in record.groups_rejected.items():
        yield f"swarm/rejected/{reason}", count
    for activity, seconds in record.seconds_by.items():
        yield f"seconds/{activity}", seconds
    for family in record.families:
        level = "" if family.level is None else f"/level_{family.level}"
        yield f"rewards/{family.family}{level}/mean", family.reward
        yield f"rewards/{family.family}{level}/std", family.reward_std
        yield f"rewards/{family.family}{level}/frac_reward_zero_std", family.frac_reward_zero_std

"""Ready mixes of tasks, as data; imports only the settings.

The demo mix is easy enough for the model that comes with the package: it starts at a mean reward of
about 0.35, and GRPO raises it within a few dozen rounds (benchmarks/learning.py).
"""

from typing import Any

from worker.settings import Family

DEMO_FAMILIES: tuple[Family, ...] = (
    Family(
        name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    ),
    Family(
        name="products", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    ),
    Family(
        name="basic_arithmetic",
        config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    ),
    Family(
        name="gcd", config={"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20}
    ),
    Family(name="count_bits", config={"max_n": 127}),
)

DEMO_SETTINGS: dict[str, Any] = {
    "model_name": "hivewright/tiny",
    "model_device": "cpu",
    "model_threads": 1,
    "environment_families": [family.model_dump() for family in DEMO_FAMILIES],
    "environment_tasks_per_round": 8,
    "generation_num_generations": 8,
    "generation_max_prompt_length": 64,
    "generation_max_completion_length": 12,
    "trainer_local_groups": 6,
    "trainer_external_groups": 6,
    "trainer_learning_rate": 2e-4,
}
"""Flat keys in which a demo worker differs from the defaults."""

REAL_MODEL_SETTINGS: dict[str, Any] = {
    "model_device": "cpu",
    "model_threads": 1,
    "environment_families": [
        {"name": name, "level": "auto"}
        for name in ("basic_arithmetic", "calendar_arithmetic", "chain_sum", "leg_counting")
    ],
    "environment_tasks_per_round": 6,
    "generation_max_prompt_length": 512,
    "generation_max_completion_length": 48,
    "trainer_local_groups": 4,
    "trainer_external_groups": 4,
}
"""A demo with a real model, small enough for three on two cores, with default prompts and training.
"""

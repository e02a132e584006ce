"""Collect the figures from which a node's health is determined (worker/telemetry/health.py)."""

import shutil

from worker import settings
from worker.policy.policy import Policy
from worker.runtime import host_memory
from worker.telemetry.status import Condition
from worker.trainer.micro_batch import Budget


def see_policy(found: Condition, policy: Policy) -> None:
    """Fill in the precision of the model, its generation engine, and its prompt template."""
    found.precision = str(policy.model.dtype).removeprefix("torch.")
    found.template = "no chat template" if policy.template.is_plain else "its own chat template"
    found.answers_share = policy.answers_share
    if policy.engine is None:
        return
    found.engine = policy.engine.name
    setbacks: dict[str, tuple[str, ...]] = {}
    for setback in policy.engine.setbacks:
        setbacks[setback.of] = (*setbacks.get(setback.of, ()), setback.reason)
    found.setbacks = setbacks


def see_budget(found: Condition, budget: Budget) -> None:
    """Fill in the sizes of the micro-batches of a training step."""
    found.training_tokens = budget.tokens
    full_tokens = budget.full_tokens or budget.tokens
    found.training_share = min(1.0, budget.tokens / full_tokens)
    found.recomputes = budget.recomputes and not (
        budget.full_recomputes or budget.full_tokens is None
    )


def see_host(found: Condition, node: settings.Node) -> None:
    """Fill in free disk space, and the pressure on the machine's memory."""
    memory = host_memory.read()
    found.disk_spare_mb = spare_mb(node)
    found.ram_available_mb, found.memory_stalled = memory.available_mb, memory.stalled


def spare_mb(node: settings.Node) -> int | None:
    """Return the free disk space beyond `node.min_free_disk_mb`, in 10^6 bytes.

    None if the disk can't be examined.
    """
    try:
        return shutil.disk_usage(node.state_dir).free // 10**6 - node.min_free_disk_mb
    except OSError:
        return None

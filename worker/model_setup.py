"""Decide how a node's model is asked and trained where its settings leave it open: for the node,
`eval` and `chat`."""

import logging
from pathlib import Path

from worker import settings
from worker.environments import Environment
from worker.evaluation import HELD_OUT
from worker.policy import form_choice, model_sizing
from worker.policy import policy as policies
from worker.policy.policy import Policy
from worker.runtime.state_dir import StateDir
from worker.trainer import checkpoint
from worker.trainer.checkpoint import State
from worker.trainer.trainer import Trainer

log = logging.getLogger(__name__)


def load_policy(all_settings: settings.Settings) -> Policy:
    """Load the model that the settings name, with its chat template as they want it. Raises as
    `policies.load`."""
    policy = policies.load(model_sizing.settle(all_settings.model, all_settings.node.state_dir))
    policy.require_context(all_settings.generation)
    policy.adopt(all_settings.generation)
    return policy


def settle_method(policy: Policy, trainer: settings.Trainer, state_dir: Path) -> settings.Trainer:
    """Decide on adapters and learning rate: as the checkpoints that are there, else by the model's
    size."""
    if trainer.lora == "auto" and checkpoint.has_adapters(StateDir(state_dir).checkpoints) is False:
        trainer = trainer.model_copy(update={"lora": None})
    return trainer.settle(policy.model.num_parameters())


def settle_form(
    policy: Policy, environment: Environment, generation: settings.Generation, state_dir: Path
) -> None:
    """Have the policy ask in the form that the settings name, that was found before, or that is
    found now."""
    tasks = environment.easy_tasks(HELD_OUT, form_choice.NUM_QUESTIONS)
    form_choice.settle(
        policy,
        generation,
        [environment.question(task) for task in tasks],
        lambda number, texts: environment.score(tasks[number], texts),
        StateDir(state_dir).form,
    )


def load_trained(all_settings: settings.Settings, checkpoints: Path) -> tuple[Policy, State | None]:
    """Load the node's model with the weights of the newest checkpoint, and that checkpoint's state;
    None without one.

    Raises as `load_policy` and `checkpoint.restore_weights` do.
    """
    policy = load_policy(all_settings)
    trainer = settle_method(policy, all_settings.trainer, all_settings.node.state_dir)
    return policy, checkpoint.restore_weights(
        checkpoints, Trainer(policy, trainer, all_settings.generation)
    )

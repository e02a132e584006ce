"""Load a node's model and decide the prompt form and training method that its settings leave open.

The node and the commands `eval` and `chat` use it.
"""

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
    """Load the model named in the settings and apply their chat template options.

    Raises the errors of `policy.load`.
    """
    policy = policies.load(model_sizing.settle(all_settings.model, all_settings.node.state_dir))
    policy.require_context(all_settings.generation)
    policy.adopt(all_settings.generation)
    return policy


def settle_method(
    policy: Policy,
    trainer: settings.Trainer,
    state_dir: Path,
) -> settings.Trainer:
    """Decide on adapters and learning rate where the settings leave them open.

    If there are checkpoints without adapters, no adapters are used; otherwise the model's size
    decides.
    """
    if trainer.lora == "auto" and checkpoint.has_adapters(StateDir(state_dir).checkpoints) is False:
        trainer = trainer.model_copy(update={"lora": None})
    return trainer.settle(policy.model.num_parameters())


def settle_form(
    policy: Policy, environment: Environment, generation: settings.Generation, state_dir: Path
) -> None:
    """Set the policy's prompt form.

    It is the form named in the settings, or else the one stored at an earlier start, or else the
    best one in a trial now.
    """
    tasks = environment.easy_tasks(HELD_OUT, form_choice.NUM_QUESTIONS)
    form_choice.settle(
        policy,
        generation,
        [environment.question(task) for task in tasks],
        lambda number, texts: environment.score(tasks[number], texts),
        StateDir(state_dir).form,
    )


def load_trained(
    all_settings: settings.Settings,
    checkpoints: Path,
) -> tuple[Policy, State | None]:
    """Load the node's model with the weights of the newest checkpoint.

    Returns the policy and the checkpoint's state, which is None if there is no checkpoint. Raises
    the errors of `load_policy` and `checkpoint.restore_weights`.
    """
    policy = load_policy(all_settings)
    trainer = settle_method(policy, all_settings.trainer, all_settings.node.state_dir)
    return policy, checkpoint.restore_weights(
        checkpoints, Trainer(policy, trainer, all_settings.generation)
    )

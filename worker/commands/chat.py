"""`hivewright chat`: talk to a node's newest checkpoint in its model's own chat template."""

import argparse
import sys
from collections.abc import Callable

from worker import environments, model_setup
from worker.errors import TrainingError
from worker.log import printable
from worker.policy.policy import Policy
from worker.policy.prompt_forms import Turns
from worker.runtime.state_dir import StateDir
from worker.settings import Generation, Settings

PROMPT = "you> "


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Answer each line of standard input until it ends; an empty line starts a new conversation.

    Raises TrainingError if there is no checkpoint.
    """
    folder = StateDir(settings.node.state_dir).checkpoints
    if options.before:
        policy, what = model_setup.load_policy(settings), "the untouched model"
    else:
        policy, state = model_setup.load_trained(settings, folder)
        if state is None:
            raise TrainingError(
                f"{folder}: no checkpoint; train first, or use --before for the untouched model"
            )
        what = f"the checkpoint after {state.get('rounds_trained', 0)} rounds"
    if options.task:
        environment = environments.load(settings.environment)
        model_setup.settle_form(policy, environment, settings.generation, settings.node.state_dir)
    print(
        f"{settings.model.name}, {what}; an empty line begins a new conversation, Ctrl-D ends",
        file=sys.stderr,
    )
    generation = settings.generation.model_copy(
        update={"num_generations": 1, "max_completion_length": options.tokens}
    )
    conversation = Conversation(policy, generation, options.seed, as_task=options.task)
    while (line := _read_line()) is not None:
        _answer(conversation, line, print)


class Conversation:
    """Turns of a person and the model.

    `as_task`: each line is a separate question, in the node's own prompt form.
    """

    def __init__(
        self,
        policy: Policy,
        generation: Generation,
        seed: int,
        *,
        as_task: bool,
    ) -> None:
        self._policy = policy
        self._generation = generation
        self._seed = seed
        self._as_task = as_task
        self.turns: Turns = []

    def restart(self) -> None:
        self.turns = []

    def say(self, text: str) -> str | None:
        """Return the model's answer; None if the conversation exceeds the model's prompt limit."""
        self._seed += 1
        if self._as_task:
            (answers,) = self._policy.generate([text], self._generation, self._seed)
            return None if answers is None else answers[0].text
        turns: Turns = [*self.turns, {"role": "user", "content": text}]
        answer = self._policy.reply(turns, self._generation, self._seed)
        if answer is None:
            return None
        self.turns = [*turns, {"role": "assistant", "content": answer.text}]
        return answer.text


def _answer(
    conversation: Conversation,
    line: str,
    show: Callable[[str], None],
) -> None:
    if not line.strip():
        conversation.restart()
        return
    answer = conversation.say(line)
    if answer is None:
        conversation.restart()
        show("(too long for generation.max_prompt_length; a new conversation begins)")
    else:
        show("\n".join(printable(part) for part in answer.strip().split("\n")))


def _read_line() -> str | None:
    """Return the next line; None at the end of input. A prompt is shown on terminals only."""
    if sys.stdin.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None

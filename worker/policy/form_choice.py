"""Choose the prompt form that suits a model by a trial on easy tasks, and store it in `form.json`.

Each form is tried with a few questions, the two best with some more. The best form is the one with
the largest share of right answers among the given ones (those with a closed tag). The share of
answers that are given at all counts little: training teaches closing the tag within a few rounds,
and a model learns less with a form that closes the tag from the start but leaves it no room to
think (docs/decisions/0027).
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker import settings
from worker.environments.answers import END
from worker.policy import memory
from worker.policy.model_sizing import TINY
from worker.policy.policy import Policy
from worker.policy.prompt_forms import BY_NAME, FORMS, Form

log = logging.getLogger(__name__)

NUM_QUESTIONS = 24
"""Questions of a trial: half of them in each form (fewer on a slow machine), the rest in the best
two."""
PATIENCE_SECONDS = 45.0
"""Seconds after which no further form is tried."""
_NUM_ANSWERS = 4
_CPU_TOKENS, _GPU_TOKENS = 48, 256
_FEWEST_QUESTIONS = 4
"""Number of questions in the first form that measure the time of one question."""
_SOLVED = 0.5
_DOUBT = 0.1
"""Wrong answers added to the given ones, as a share of all answers.

Without it, a form with a single given answer, which is right, would be the best.
"""
_FIRST_TRIED = ("three-examples", "example", "begun")
"""Forms that are tried first, even if PATIENCE_SECONDS have passed."""
_SEED = 1

Score = Callable[[int, Sequence[str]], Sequence[float]]
"""Return the reward of each answer to the question with this index."""


@dataclass(slots=True)
class Trial:
    """The counts of one form's trial.

    `useful` counts tasks whose rewards differ or that are solved, `closed` the answers that closed
    their tag.
    """

    form: Form
    tasks: int = 0
    useful: int = 0
    reward_sum: float = 0.0
    closed: int = 0
    answers: int = 0

    @property
    def accuracy(self) -> float:
        """The share of right answers among the given ones, lower if few were given (_DOUBT)."""
        return self.reward_sum / max(1.0, self.closed + _DOUBT * self.answers)

    @property
    def rank(self) -> tuple[float, float, float]:
        """The sort key (larger is better): accuracy, shares of useful tasks and closed answers.

        A form with a begun answer has no room for reasoning, so it has to be better by more than
        the standard error of its accuracy, which is large after few questions. Defined only after
        at least one task.
        """
        accuracy = self.accuracy
        if self.form.beginning:
            accuracy -= math.sqrt(accuracy * (1 - accuracy) / max(1, self.closed))
        return accuracy, self.useful / self.tasks, self.closed / max(1, self.answers)


def settle(
    policy: Policy,
    generation: settings.Generation,
    questions: Sequence[str],
    score: Score,
    file: Path,
) -> None:
    """Set the prompt form of `policy`.

    It is the one that the settings name; with "auto" it is the one in `file`, or else the best of a
    trial, which `file` then stores.

    Raises ModelError if the model's chat template can't be rendered in the form.
    """
    if generation.form != "auto":
        policy.ask_in(BY_NAME[generation.form])
        return
    if policy.name == TINY:  # trained with the default form
        return
    key = _describe(policy)
    known = BY_NAME.get(str((memory.recall(file, key) or {}).get("form")))
    if known is not None:
        policy.ask_in(known)
        log.info("form form=%s", known.name)
        return
    started = time.monotonic()
    trials = try_forms(policy, generation, questions, score)
    best = max(trials, key=lambda trial: (trial.rank, -FORMS.index(trial.form)))
    policy.ask_in(best.form)
    memory.remember(file, key, {"form": best.form.name})
    log.info(
        "form chosen form=%s accuracy=%.2f reward_mean=%.3f closed=%.2f useful_tasks=%d of=%d"
        " forms_tried=%d seconds=%.0f",
        best.form.name,
        best.accuracy,
        best.reward_sum / max(1, best.answers),
        best.closed / max(1, best.answers),
        best.useful,
        best.tasks,
        len(trials),
        time.monotonic() - started,
    )
    if not any(trial.closed for trial in trials):
        log.warning(
            "no answer closed an <answer> tag, in whatever form it was asked; the last one tried"
            " was form=%s; a model that follows instructions, or a higher"
            " generation.max_completion_length (%d), helps",
            trials[-1].form.name,
            generation.max_completion_length,
        )


def try_forms(
    policy: Policy, generation: settings.Generation, questions: Sequence[str], score: Score
) -> list[Trial]:
    """Ask some of the questions in each form and the rest in the two best; return all trials.

    Takes about PATIENCE_SECONDS. The forms in _FIRST_TRIED are always tried; a slow machine asks
    fewer questions in them.
    """
    started = time.monotonic()
    until = started + PATIENCE_SECONDS
    limit = _CPU_TOKENS if policy.model.device.type == "cpu" else _GPU_TOKENS
    briefly = generation.model_copy(
        update={
            "num_generations": _NUM_ANSWERS,
            "max_completion_length": min(limit, generation.max_completion_length),
        }
    )
    forms = [form for form in sorted(FORMS, key=_turn) if policy.can_ask_in(form)]
    trials = [Trial(forms[0])]
    few = range(min(_FEWEST_QUESTIONS, len(questions)))
    _ask(policy, briefly, trials[0], questions, few, score)
    seconds_each = (time.monotonic() - started) / len(few)
    affordable = int(PATIENCE_SECONDS / len(_FIRST_TRIED) / max(seconds_each, 1e-3))
    count = max(len(few), min(affordable, len(questions) // 2))
    _ask(policy, briefly, trials[0], questions, range(len(few), count), score)
    for form in forms[1:]:
        expected = (time.monotonic() - started) / len(trials)
        if form.name not in _FIRST_TRIED and time.monotonic() + expected > until:
            break
        trials.append(Trial(form))
        _ask(policy, briefly, trials[-1], questions, range(count), score)
    for trial in sorted(trials, key=lambda trial: trial.rank, reverse=True)[:2]:
        if time.monotonic() < until:
            _ask(policy, briefly, trial, questions, range(count, len(questions)), score)
    return trials


def _turn(form: Form) -> tuple[int, int]:
    """Return the sort key of a form: first _FIRST_TRIED, then forms with shorter answers."""
    is_first = form.name in _FIRST_TRIED
    return (_FIRST_TRIED.index(form.name) if is_first else len(_FIRST_TRIED)), -FORMS.index(form)


def _ask(
    policy: Policy,
    generation: settings.Generation,
    trial: Trial,
    questions: Sequence[str],
    numbers: range,
    score: Score,
) -> None:
    if not numbers:
        return
    policy.ask_in(trial.form)
    answers = policy.generate([questions[i] for i in numbers], generation, _SEED)
    for number, completions in zip(numbers, answers, strict=True):
        if completions is None:  # the prompt is too long in this form: the task is not useful
            trial.tasks += 1
            continue
        texts = [completion.text for completion in completions]
        rewards = score(number, texts)
        mean = sum(rewards) / len(rewards)
        trial.tasks += 1
        trial.useful += max(rewards) > min(rewards) or mean >= _SOLVED
        trial.reward_sum += sum(rewards)
        trial.closed += sum(END in text for text in texts)
        trial.answers += len(texts)


def _describe(policy: Policy) -> str:
    """Return the key of a stored form: the model's name and a hash of its rendered template.

    Another model or template may need another form.
    """
    asked = "\n".join(
        policy.template.text(form, "question") for form in FORMS if policy.can_ask_in(form)
    )
    return f"{policy.name} asked as {hashlib.sha256(asked.encode()).hexdigest()[:16]}"

"""Find the form of asking that suits a model: tried once, on easy tasks, and remembered in
`form.json`.

Each form is asked a few tasks; the best two are asked some more. The best is the one whose given
answers are right most often. Whether an answer is given at all, its tag closed, counts little:
training teaches that within a few rounds, and a form that has it from the beginning at the price of
the model's thoughts stays behind (docs/decisions/0027).
"""

import hashlib
import logging
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
"""Half of them are asked in every form, fewer on a slow machine; the others in the best two."""
PATIENCE_SECONDS = 45.0
"""No further form is tried after so long."""
_NUM_ANSWERS = 4
_CPU_TOKENS, _GPU_TOKENS = 48, 256
_FEWEST_QUESTIONS = 4
"""Asked in the first form to see how long a question takes."""
_SOLVED = 0.5
_DOUBT = 0.1
"""As many wrong answers as this share of all are added to those given: a form that gives one
answer, a right one, is not the best for that."""
_FIRST_TRIED = ("three-examples", "example", "begun")
"""Forms that are tried even where the model is so slow that the time ends before all are."""
_SEED = 1

Score = Callable[[int, Sequence[str]], Sequence[float]]
"""The rewards of answers to the question of this number."""


@dataclass(slots=True)
class Trial:
    """The result of asking in a form. `useful`: tasks that teach something, or are solved."""

    form: Form
    tasks: int = 0
    useful: int = 0
    reward_sum: float = 0.0
    closed: int = 0
    answers: int = 0

    @property
    def accuracy(self) -> float:
        """Share of the given answers that are right, in doubt where few were given."""
        return self.reward_sum / max(1.0, self.closed + _DOUBT * self.answers)

    @property
    def rank(self) -> tuple[float, float, float]:
        """Larger is better."""
        return self.accuracy, self.useful / self.tasks, self.closed / max(1, self.answers)


def settle(
    policy: Policy,
    generation: settings.Generation,
    questions: Sequence[str],
    score: Score,
    file: Path,
) -> None:
    """Have `policy` ask in the form that the settings name, that `file` remembers, or that is found
    now.

    Raises ModelError for a form that the model's template can't be rendered in.
    """
    if generation.form != "auto":
        policy.ask_in(BY_NAME[generation.form])
        return
    if policy.name == TINY:  # made for the form that it has
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
        "form found form=%s accuracy=%.2f reward_mean=%.3f closed=%.2f useful_tasks=%d of=%d"
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
    """Ask some of the questions in every form and the rest in the best two.

    Ends after about PATIENCE_SECONDS. _FIRST_TRIED are tried however slow the machine is: the
    slower, the fewer questions.
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
    """Return a form's turn: _FIRST_TRIED, then those with short answers before others."""
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
        if completions is None:  # its prompt is too long in this form: nothing is learned from it
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
    """The model, its template and how that is rendered: another form may suit others."""
    asked = "\n".join(
        policy.template.text(form, "question") for form in FORMS if policy.can_ask_in(form)
    )
    return f"{policy.name} asked as {hashlib.sha256(asked.encode()).hexdigest()[:16]}"

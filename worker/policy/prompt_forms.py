"""The forms in which a question is put to a model: a few named forms, as data, and how each becomes
a prompt.

Which form lets a model answer differs from model to model: small ones close no tag unless an
example shows them how, or unless the tag is opened for them. `form_choice.py` finds out which one
suits a model. What an answer is does not depend on the form: its beginning, where a form has one,
is part of the answer that is scored and shared.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from worker import settings
from worker.environments.answers import BEGIN, PLACEHOLDER, tagged
from worker.errors import ModelError

INSTRUCTION = (
    "Answer the question. Think first if that helps; then give the final answer as"
    f" {tagged(PLACEHOLDER)}."
)
LONG_ENOUGH_TO_THINK = 1024
"""Tokens of an answer from which on a model that thinks by default is left to do so."""
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_SWITCHES = ("enable_thinking", "thinking")  # Qwen3, SmolLM3, GLM; DeepSeek, Granite
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What rendering a model's own template may raise: its program, or jinja2 over it."""
_CODE = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL)

Turns = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to ask.

    `instruction`: where it stands, "first" (the system turn, or the beginning of the first user
    turn where a template has no system role) or "last" (at the end of each user turn). `examples`:
    questions with their answers, each as a turn of its own before the question. `beginning`: the
    answer begins with it, and the model goes on from there.
    """

    name: str
    instruction: Literal["first", "last"]
    examples: tuple[tuple[str, str], ...] = ()
    beginning: str = ""


_SUM = ("What is 3 plus 4?", tagged("7"))
_SUM_WITH_A_THOUGHT = ("What is 3 plus 4?", f"3 plus 4 is 7. {tagged('7')}")
_DAY = ("Which day comes after Monday?", tagged("Tuesday"))
_DAY_WITH_A_THOUGHT = (
    "Which day comes after Monday?",
    f"After Monday comes Tuesday. {tagged('Tuesday')}",
)
_PRODUCT_WITH_A_THOUGHT = ("What is 2 times 6?", f"2 times 6 is 12. {tagged('12')}")

FORMS = (
    Form("system", "first"),
    Form("user", "last"),
    Form("example", "last", (_SUM_WITH_A_THOUGHT,)),
    Form(
        "three-examples",
        "last",
        (_SUM_WITH_A_THOUGHT, _DAY_WITH_A_THOUGHT, _PRODUCT_WITH_A_THOUGHT),
    ),
    Form("two-examples", "first", (_SUM, _DAY)),
    Form("user-begun", "last", (_SUM,), BEGIN),
    Form("begun", "first", (_SUM,), BEGIN),
)
"""Those that leave the model the most freedom first."""
BY_NAME = {form.name: form for form in FORMS}
DEFAULT = FORMS[0]


class Template:
    """A tokenizer's chat template, or plain text where it has none, and the switches that it is
    rendered with."""

    def __init__(self, tokenizer: Any, model_name: str, generation: settings.Generation) -> None:
        """Raises ModelError if the template can't be rendered in any way."""
        self._tokenizer = tokenizer
        self.is_plain = tokenizer.chat_template is None
        self.options = _options(str(tokenizer.chat_template or ""), generation)
        self._closes_thoughts = _thinking(generation) is False
        self.thinks = not self._closes_thoughts and any(
            name in str(tokenizer.chat_template) for name in _SWITCHES
        )
        self._has_system = True
        self._model_name = model_name
        if not self.is_plain:
            self._find_system_role()
        self.opens_thought = not self.is_plain and is_open_thought(self.text(DEFAULT, "question"))

    def text(self, form: Form, question: str) -> str:
        """Return what the model is asked, up to where its answer begins, `form.beginning` not
        included.

        Raises ModelError if the template can't be rendered so.
        """
        if self.is_plain:
            return _plain_text(form, question)
        turns = self._turns(form, question)
        try:
            text = self._render(turns)
        except _TEMPLATE_ERRORS as error:
            raise ModelError(self._complaint(form, error)) from error
        if self._closes_thoughts and is_open_thought(text):
            text = text.rstrip("\n") + f"\n\n{_THOUGHT_END}\n\n"
        return text

    def ids(self, form: Form, question: str) -> list[int]:
        """The tokens of `text`. A template names the tokens that begin a text itself."""
        return list(
            self._tokenizer.encode(self.text(form, question), add_special_tokens=self.is_plain)
        )

    def chat_ids(self, turns: Turns) -> list[int]:
        """The tokens of a conversation, up to where the model's next turn begins.

        Raises ModelError if the template can't be rendered so.
        """
        if self.is_plain:
            text = "\n".join(turn["content"] for turn in turns) + "\n"
        else:
            try:
                text = self._render(turns)
            except _TEMPLATE_ERRORS as error:
                raise ModelError(self._complaint(DEFAULT, error)) from error
        return list(self._tokenizer.encode(text, add_special_tokens=self.is_plain))

    def _turns(self, form: Form, question: str) -> Turns:
        turns: Turns = []
        for asked, answer in (*form.examples, (question, None)):
            content = f"{asked}\n\n{INSTRUCTION}" if form.instruction == "last" else asked
            turns.append({"role": "user", "content": content})
            if answer is not None:
                turns.append({"role": "assistant", "content": answer})
        if form.instruction == "first" and self._has_system:
            return [{"role": "system", "content": INSTRUCTION}, *turns]
        if form.instruction == "first":
            turns[0]["content"] = f"{INSTRUCTION}\n\n{turns[0]['content']}"
        return turns

    def _render(self, turns: Turns) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.options
            )
        )

    def _find_system_role(self) -> None:
        """Some templates refuse a system turn (Gemma, Mistral), each in its own way."""
        for self._has_system in (True, False):
            try:
                self._render(self._turns(DEFAULT, "question"))
            except _TEMPLATE_ERRORS as error:
                reason = error
            else:
                return
        raise ModelError(self._complaint(DEFAULT, reason)) from reason

    def _complaint(self, form: Form, error: Exception) -> str:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return (
            f"model {self._model_name}: its chat template can't be rendered in the form"
            f" {form.name}: {reason}; correct generation.chat_template_kwargs or the model's"
            " chat_template, or take another model"
        )


def is_open_thought(text: str) -> bool:
    """Return whether a thought has begun in `text` and not ended."""
    return text.rfind(_THOUGHT) > text.rfind(_THOUGHT_END)


def _options(template: str, generation: settings.Generation) -> dict[str, Any]:
    """Return what the template is rendered with: the settings' own, and the switch for thinking
    where it has one."""
    options = dict(generation.chat_template_kwargs)
    code = " ".join(_CODE.findall(template))
    switch = next(
        (name for name in _SWITCHES if re.search(rf"(?<![\w.'\"]){name}\b(?!['\"])", code)), None
    )
    thinks = _thinking(generation)
    if switch is None or switch in options or thinks is None:
        return options
    return {**options, switch: thinks}


def _thinking(generation: settings.Generation) -> bool | None:
    """Return whether the model should think first; None: as its template has it."""
    is_short = generation.max_completion_length < LONG_ENOUGH_TO_THINK
    return {"on": True, "off": False, "template": None, "auto": False if is_short else None}[
        generation.thinking
    ]


def _plain_text(form: Form, question: str) -> str:
    """For models without a chat template."""
    if not form.examples:
        first, last = (
            (INSTRUCTION, question) if form.instruction == "first" else (question, INSTRUCTION)
        )
        return f"{first}\n\n{last}\n"
    shown = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in form.examples)
    return f"{INSTRUCTION}\n\n{shown}Question: {question}\nAnswer:" + (
        " " if form.beginning else ""
    )

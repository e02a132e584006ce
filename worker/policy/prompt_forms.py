"""Define the prompt forms of a question, and render them with a model's chat template.

Models differ in the forms that they can answer: small ones close the answer tag only after an
example, or if the prompt opens the tag for them. `form_choice.py` chooses the form for a model. An
answer is the same thing in every form: if a form has a `beginning`, it is part of the answer that
is scored and shared.
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
"""Smallest max_completion_length, in tokens, at which thinking "auto" keeps the template's
default."""
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
"""Errors of rendering a model's own template: raised by its expressions, or by jinja2."""
_CODE = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL)

Turns = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to put a question to a model.

    `instruction` is the place of INSTRUCTION: "first" (in the system turn, or at the beginning of
    the first user turn if the template does not have a system role) or "last" (at the end of each
    user turn). `examples` are pairs of question and answer, rendered as turns before the question.
    `beginning` is the start of the answer, which the model continues; empty if the model writes the
    whole answer.
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
"""All forms, ordered from the most freedom for the model to the least."""
BY_NAME = {form.name: form for form in FORMS}
DEFAULT = FORMS[0]


class Template:
    """A tokenizer's chat template and the options that it is rendered with.

    Without a chat template, prompts are plain text (`is_plain`). `thinks`: the template has a
    switch for thinking and the settings leave it on. `opens_thought`: the prompt ends inside an
    open thought.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_name: str,
        generation: settings.Generation,
    ) -> None:
        """Find the options; raise ModelError if the default form can't be rendered."""
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
        """Return the prompt of a question, without `form.beginning`.

        Raises ModelError if the template can't be rendered in this form.
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

    def ids(
        self,
        form: Form,
        question: str,
    ) -> list[int]:
        """Return the token ids of `text`.

        Special tokens are added only to plain text, because a template contains its own. Raises
        ModelError as `text` does.
        """
        return list(
            self._tokenizer.encode(self.text(form, question), add_special_tokens=self.is_plain)
        )

    def chat_ids(self, turns: Turns) -> list[int]:
        """Return the token ids of a conversation, up to the beginning of the model's next turn.

        Raises ModelError if the template can't be rendered with these turns.
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
        """Set `_has_system` to whether the template accepts a system turn.

        Some templates (Gemma, Mistral) refuse it, with different errors. Raises ModelError if the
        template can't be rendered without it either.
        """
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
    """Return whether `text` ends inside a thought."""
    return text.rfind(_THOUGHT) > text.rfind(_THOUGHT_END)


def _options(
    template: str,
    generation: settings.Generation,
) -> dict[str, Any]:
    """Return the options of the template: those of the settings, and its switch for thinking.

    The switch is left out if the template does not have one, the settings set it themselves, or
    the template's default applies.
    """
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
    """Return whether the model should think first; None: the template's default."""
    is_short = generation.max_completion_length < LONG_ENOUGH_TO_THINK
    return {"on": True, "off": False, "template": None, "auto": False if is_short else None}[
        generation.thinking
    ]


def _plain_text(form: Form, question: str) -> str:
    """Return the prompt for a model without a chat template."""
    if not form.examples:
        first, last = (
            (INSTRUCTION, question) if form.instruction == "first" else (question, INSTRUCTION)
        )
        return f"{first}\n\n{last}\n"
    shown = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in form.examples)
    return f"{INSTRUCTION}\n\n{shown}Question: {question}\nAnswer:" + (
        " " if form.beginning else ""
    )

"""Tests of prompt forms: templates with switches, thinking, and the choice of a form."""

import copy
import importlib.util
import logging

import pytest

from tests.policy.small_models import FAMILIES, make_tokenizer
from worker import settings
from worker.errors import ModelError
from worker.policy import engine_forecast, form_choice, prompt_forms
from worker.policy import policy as module
from worker.policy.prompt_forms import BY_NAME, FORMS, INSTRUCTION, Template
from worker.records import Completion
from worker.settings import Generation

SWITCHED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt"
    " %}[assistant]{% if enable_thinking is defined and enable_thinking is false"
    " %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]<think>\n"


def make_policy(tiny, template):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    return module.Policy(tiny.model, tokenizer, "some model")


@pytest.fixture(scope="module")
def tiny():
    return module.load(settings.Model(device="cpu"))


def test_settings_name_the_forms_that_there_are():
    names = settings.Generation.model_fields["form"].annotation.__args__
    assert set(names) == {"auto", *BY_NAME}


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_can_be_rendered_by_every_kind_of_template(name, form):
    """Render with and without a system role, with alternating turns, and without a template."""
    template = Template(make_tokenizer(FAMILIES[name]), name, Generation())
    text = template.text(form, "How many legs?")
    asked = 1 + (len(form.examples) if form.instruction == "last" and not template.is_plain else 0)
    assert text.count(INSTRUCTION) == asked
    assert text.count("How many legs?") == 1
    for question, answer in form.examples:
        assert text.index(question) < text.index(answer) < text.index("How many legs?")


def test_a_template_that_raises_is_a_model_error_of_one_line(tiny):
    for template in (
        "{{ raise_exception('no\nway') }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{% if",
    ):
        with pytest.raises(
            ModelError, match="some model: its chat template can't be rendered"
        ) as caught:
            make_policy(tiny, template)
        assert "\n" not in str(caught.value)


def test_a_template_that_takes_one_turn_only_is_asked_in_the_forms_that_it_takes(tiny):
    policy = make_policy(
        tiny,
        "{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}{{"
        " messages[-1].content }}",
    )
    assert [form.name for form in FORMS if policy.can_ask_in(form)] == ["system", "user"]
    with pytest.raises(ModelError, match="in the form begun: one"):
        policy.ask_in(BY_NAME["begun"])


def test_a_tokenizer_without_the_tag_s_characters_is_refused(tiny):
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>")
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(
        ModelError, match=r"its tokenizer can't write <answer>7</answer> \(it becomes"
    ):
        module.Policy(tiny.model, tokenizer, "x")


@pytest.mark.parametrize(
    ("generation", "is_off"),
    [
        (Generation(), True),
        (Generation(max_completion_length=1024), False),
        (Generation(max_completion_length=1024, thinking="off"), True),
        (Generation(thinking="on"), False),
        (Generation(thinking="template"), False),
        (Generation(chat_template_kwargs={"enable_thinking": True}), False),
    ],
)
def test_thinking_is_switched_by_the_length_of_answers_and_by_the_settings(
    tiny, generation, is_off
):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = SWITCHED
    text = Template(tokenizer, "x", generation).text(FORMS[0], "Why?")
    assert text.endswith("</think>\n\n") == is_off


def test_a_thought_that_the_template_opens_is_closed_where_it_must_not_be_had(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = OPENED
    assert (
        Template(tokenizer, "x", Generation())
        .text(FORMS[0], "Why?")
        .endswith("<think>\n\n</think>\n\n")
    )
    thinking = Template(tokenizer, "x", Generation(thinking="on"))
    assert thinking.text(FORMS[0], "Why?").endswith("<think>")
    assert thinking.opens_thought


def ends(policy, text):
    return policy._has_answer_end(policy._text_ids(text))


def test_an_answer_ends_outside_of_thoughts_only_and_never_with_the_instruction_s_example(tiny):
    policy = make_policy(tiny, SWITCHED)
    assert ends(policy, "It is <answer>7</answer>")
    assert not ends(policy, "<think>the format is <answer>7</answer>")
    assert ends(policy, "<think>so <answer>1</answer></think>It is <answer>7</answer>")
    assert not ends(policy, "I give <answer>your answer</answer>")
    assert not ends(policy, "I give <answer>your answer</answer> >")
    assert ends(policy, "I give <answer>your answer</answer> so <answer>7</answer>")
    opened = make_policy(tiny, OPENED)
    opened.adopt(Generation(thinking="on"))
    assert not ends(opened, "the format is <answer>7</answer>")
    assert ends(opened, "hm</think><answer>7</answer>")


def test_what_an_answer_begins_with_is_part_of_it_and_peers_texts_are_read_with_or_without_it(tiny):
    policy = make_policy(tiny, SWITCHED)
    plain = policy.prompt_ids("Why?")
    policy.ask_in(BY_NAME["begun"])
    [answers] = policy.generate(["Why?"], Generation(num_generations=4, max_completion_length=8), 0)
    for answer in answers:
        assert answer.text == "<answer>" + policy._decode(answer.token_ids)
    begun, bare = policy.prompt_ids("Why?"), policy.prompt_ids("Why?", "It is <answer>7</answer>")
    assert policy.tokenizer.decode(begun) == policy.tokenizer.decode(bare) + "<answer>"
    assert len(bare) > len(plain)  # the example
    whole = "<answer>7</answer>"
    ids, truncated = policy.completion_ids(whole, 12)
    assert (policy._decode(ids), truncated) == ("7</answer>", False)
    assert policy.tokenizer.decode(policy.prompt_ids("Why?", whole) + ids).endswith(
        "[assistant]<think>\n\n</think>\n\n" + whole
    )


def test_a_gguf_file_is_a_model_or_one_line_says_what_is_missing(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match=r"model.gguf: no such file; expected a GGUF file"):
        module.load(settings.Model(name=str(file), device="cpu"))
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (module.load, engine_forecast.read):
        with pytest.raises(
            ModelError, match=r"the package gguf, which reads it, is not installed; install it \("
        ):
            read(settings.Model(name=str(file), device="cpu"))


class Said:
    """A policy whose answers depend on the form of the prompt."""

    name = "said"

    def __init__(self, tiny, closing):
        self.model, self.template, self.form = (
            tiny.model,
            make_policy(tiny, SWITCHED).template,
            prompt_forms.DEFAULT,
        )
        self.closing, self.asked = closing, []

    def can_ask_in(self, form):
        return form.name != "example"

    def ask_in(self, form):
        self.form = form

    def generate(self, questions, generation, seed):
        self.asked.append((self.form.name, len(questions)))
        texts = self.closing.get(self.form.name, ["no"] * 4)
        return [[Completion(text, (1,), (0.0,), truncated=False) for text in texts]] * len(
            questions
        )


def score(number, texts):
    return [float(text == "<answer>7</answer>") for text in texts]


RIGHT, WRONG = "<answer>7</answer>", "<answer>8</answer>"


def test_the_form_with_the_most_accurate_answers_is_found_once_and_remembered(
    tiny, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    closing = {
        "user-begun": [WRONG] * 4,
        "begun": [RIGHT, WRONG, WRONG, WRONG],
        "user": [RIGHT, RIGHT, WRONG, "no"],
    }
    policy = Said(tiny, closing)
    form_choice.settle(policy, Generation(), ["?"] * 16, score, tmp_path / "form.json")
    assert policy.form.name == "user"
    names = ["three-examples", "begun", "user-begun", "two-examples", "user", "system"]
    first, *others = names
    expected = [(first, 4), (first, 4), *((name, 8) for name in others)]
    assert policy.asked == [*expected, ("user", 8), ("begun", 8)]
    assert (
        "form chosen form=user accuracy=0.59 reward_mean=0.500 closed=0.75 useful_tasks=16 of=16"
        in caplog.text
    )
    again = Said(tiny, {})
    form_choice.settle(again, Generation(), ["?"] * 16, score, tmp_path / "form.json")
    assert (again.form.name, again.asked) == ("user", [])


def test_accuracy_of_given_answers_counts_before_how_many_are_given(tiny, tmp_path):
    closing = {"begun": [RIGHT, WRONG, WRONG, WRONG], "user": ["no", "no", RIGHT, "no"]}
    policy = Said(tiny, closing)
    form_choice.settle(policy, Generation(), ["?"] * 16, score, tmp_path / "form.json")
    assert policy.form.name == "user"


def test_one_right_answer_among_many_that_are_none_is_not_enough():
    begun, user = form_choice.Trial(BY_NAME["begun"]), form_choice.Trial(BY_NAME["user"])
    begun.answers, begun.closed, begun.reward_sum, begun.tasks = 96, 90, 60.0, 24
    user.answers, user.closed, user.reward_sum, user.tasks = 96, 1, 1.0, 24
    assert begun.rank > user.rank


@pytest.mark.parametrize(("num_tasks", "best"), [(5, "three-examples"), (24, "user-begun")])
def test_begun_answers_need_more_questions_to_be_preferred(num_tasks, best):
    begun, worked = (form_choice.Trial(BY_NAME[name]) for name in ("user-begun", "three-examples"))
    for trial, closed, accuracy in ((begun, 0.95, 0.28), (worked, 0.35, 0.2)):
        trial.tasks, trial.answers = num_tasks, 4 * num_tasks
        trial.closed = round(closed * trial.answers)
        trial.reward_sum = accuracy * (trial.closed + form_choice._DOUBT * trial.answers)
    assert max((begun, worked), key=lambda trial: trial.rank).form.name == best


def test_the_settings_name_a_form(tiny, tmp_path):
    policy = Said(tiny, {})
    form_choice.settle(
        policy, Generation(form="two-examples"), ["?"] * 16, score, tmp_path / "form.json"
    )
    assert (policy.form.name, policy.asked) == ("two-examples", [])
    assert not (tmp_path / "form.json").exists()


def test_a_model_that_never_closes_a_tag_is_reported_with_what_helps(tiny, tmp_path, caplog):
    policy = Said(tiny, {})
    form_choice.settle(policy, Generation(), ["?"] * 16, score, tmp_path / "form.json")
    assert policy.form.name == "system"  # the one with the most freedom
    assert caplog.text.count("no answer closed an <answer> tag") == 1
    assert "the last one tried was form=system; a model that follows instructions" in caplog.text


def test_a_slow_machine_asks_fewer_questions_and_still_compares(tiny, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(form_choice.time, "monotonic", lambda: clock[0])

    class Slow(Said):
        def generate(self, questions, generation, seed):
            clock[0] += 2.5 * len(questions)
            return super().generate(questions, generation, seed)

    policy = Slow(tiny, {"begun": [RIGHT] * 4})
    form_choice.settle(policy, Generation(), ["?"] * 24, score, tmp_path / "form.json")
    # 45 s make 15 for each of the first forms, of which `example` can't be asked here.
    assert policy.asked[:3] == [("three-examples", 4), ("three-examples", 2), ("begun", 6)]
    assert policy.form.name == "begun"
    assert clock[0] < 60

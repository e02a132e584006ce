"""Messages about wrong settings, in the words of people who write them."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from deploys.inventory.schema import Deployment
from worker import settings
from worker.errors import SettingsError
from worker.settings import Settings, explanations
from worker.settings.settings_files import flat_mistakes


def nested(raw: dict[str, Any]) -> list[str]:
    """Return the message about each mistake in a settings file's content."""
    with pytest.raises(SettingsError) as caught:
        settings.parse(raw, "here")
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trainer": {"epsilon": "a"}}, "here: trainer.epsilon: got 'a'; expected a number"),
        ({"trainer": {"epsilon": True}}, "here: trainer.epsilon: got True; expected a number"),
        ({"node": {"name": 7}}, "here: node.name: got 7; expected text; put it in quotes"),
        ({"node": 7}, "here: node: got 7; expected a mapping"),
        ({"swarm": {"bootnodes": "x"}}, "here: swarm.bootnodes: got 'x'; expected a list"),
        ({"nod": {}}, "here: nod: not a known key; did you mean node?"),
        (
            {"zzz": {}},
            "here: zzz: not a known key; docs/configuration.md lists all keys",
        ),
        (
            {"trainer": {"learningrate": 1.0}},
            "here: trainer.learningrate: not a known key; did you mean trainer.learning_rate?",
        ),
        (
            {"trainer": {"learning_rate": "1e-5"}},
            "here: trainer.learning_rate: got '1e-5'; expected a number; YAML reads it as text:"
            " write it with a point and without quotes, such as 1.0e-5",
        ),
    ],
)
def test_mistake_in_a_file_is_named_with_value_expectation_and_advice(
    raw: dict[str, Any], message: str
) -> None:
    assert nested(raw) == [message]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"trainer_epsilon": "a"}, "trainer_epsilon: got 'a'; expected a number"),
        (
            {"trainer_learning_rate": "1e-5"},
            "trainer_learning_rate: got '1e-5'; expected a number; write it without quotes",
        ),
        ({"trainer_epslon": 1}, "trainer_epslon: not a known key; did you mean trainer_epsilon?"),
        ({"trainer": {}}, "trainer: not a known key; docs/configuration.md lists all keys"),
    ],
)
def test_mistake_in_an_inventory_is_named_by_its_flat_key(
    flat: dict[str, Any], message: str
) -> None:
    (found,) = flat_mistakes(flat)
    assert found.partition(";")[0] == message.partition(";")[0]
    assert found == message or "did you mean" in found


def test_value_that_no_file_could_have_is_one_mistake() -> None:
    (found,) = flat_mistakes({"trainer_epsilon": {1, 2}})
    assert found.startswith("trainer_epsilon: got ")
    assert found.endswith("; expected plain text, numbers, lists and dicts")


def test_each_mistake_has_a_message_but_not_what_follows_from_another() -> None:
    found = flat_mistakes(
        {"trainer_epsilon": "a", "environment_families": [{"name": 7}], "nothing_here": 1}
    )
    assert sorted(line.partition(":")[0] for line in found) == [
        "environment_families/0/name",
        "nothing_here",
        "trainer_epsilon",
    ]


def patterns_in(schema: Any) -> Iterator[str]:
    """Yield every pattern of a JSON schema."""
    for name, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if name == "pattern" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from patterns_in(value)


@pytest.mark.parametrize("model", [Settings, Deployment], ids=lambda model: model.__name__)
def test_pattern_of_every_setting_and_inventory_key_has_words(model: type[BaseModel]) -> None:
    patterns = set(patterns_in(model.model_json_schema()))
    assert len(patterns) > 2
    assert not {pattern for pattern in patterns if pattern in explanations.form(pattern)}


def test_pattern_without_words_is_shown_itself() -> None:
    assert explanations.form("^x+$") == "text of the form ^x+$"
    known = explanations.form("^(auto|cpu|cuda(:[0-9]+)?)$")
    assert known == "auto, cpu, cuda, or cuda:0 and so on"

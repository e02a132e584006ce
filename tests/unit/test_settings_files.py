"""Files of settings: hostile and damaged YAML is one line, and what is written is read again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker import settings
from worker.errors import SettingsError
from worker.settings.settings_files import MAX_FILE_BYTES


def refusal(tmp_path: Path, text: str) -> str:
    """Return the message about a settings file, without the name of the file."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        settings.load(file)
    source = f"settings file {file}: "
    message = str(refused.value)
    assert message.startswith(source)
    assert "\n" not in message
    return message.removeprefix(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "node: {name: 2024-02-30}\n",
            "not YAML at line 1: '2024-02-30' is not a valid timestamp; text needs quotes",
        ),
        (
            "node:\n  seed: 0x_\n",
            "not YAML at line 2: '0x_' is not a valid int; text needs quotes",
        ),
        (
            "node: !!float fast\n",
            "not YAML at line 1: 'fast' is not a valid float; text needs quotes",
        ),
        (
            "node: !!timestamp now\n",
            "not YAML at line 1: 'now' is not a valid timestamp; text needs quotes",
        ),
        ("? [a, b]\n: c\n", "not YAML at line 1: found unhashable key"),
        ("? {a: b}\n: c\n", "not YAML at line 1: found unhashable key"),
        (
            "node: !!python/object/apply:os.system [true]\n",
            (
                "not YAML at line 1: could not determine a constructor for the tag"
                " 'tag:yaml.org,2002:python/object/apply:os.system'"
            ),
        ),
        ("log: {level: INFO}\nlog: {}\n", "not YAML at line 2: the key 'log' occurs twice"),
        (
            "node:\n  name: a\n  seed: 1\n  name: b\n",
            "not YAML at line 4: the key 'name' occurs twice",
        ),
        ("log: {}\n---\nlog: {}\n", "not YAML at line 2: but found another document"),
        ("\x07", "not YAML: unreadable"),
        ("node: &node [*node]\n", "Circular reference detected; expected plain YAML values"),
        (
            "node: {name: 2024-02-28}\n",
            "Object of type date is not JSON serializable; expected plain YAML values",
        ),
        ("", "is empty; expected sections such as `node:` (docs/configuration.md lists them)"),
        ("- node\n", "got a list; expected sections such as `node:`"),
        ("node\n", "got a str; expected sections such as `node:`"),
        ("node:\n", "node: got None; expected a mapping"),
        ("node: {seed: .nan}\n", "node.seed: got nan; expected a whole number"),
        (
            "trainer: {learning_rate: -.inf}\n",
            "trainer.learning_rate: got -inf; expected a finite number",
        ),
    ],
)
def test_file_that_no_role_can_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


def test_number_with_too_many_digits_is_cut_in_the_message(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"node: {{seed: {'9' * 5000}}}\n")
    assert message.startswith("not YAML at line 1: '999")
    assert message.endswith("999... is not a valid int; text needs quotes")
    assert len(message) < 150


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            "2",
            (
                "version: 2 is newer than 1, the newest that this hivewright reads; upgrade"
                " hivewright, or write the file with this one"
            ),
        ),
        ("0", "version: got 0; expected greater than 0"),
        ("-5", "version: got -5; expected greater than 0"),
        ("true", "version: got True; expected a whole number"),
        ("'1'", "version: got '1'; expected a whole number"),
        ("1.0", "version: got 1.0; expected a whole number"),
        (".inf", "version: got inf; expected a whole number"),
    ],
)
def test_version_is_the_number_of_a_form_that_is_known(
    tmp_path: Path, version: str, message: str
) -> None:
    assert refusal(tmp_path, f"version: {version}\n") == message


@pytest.mark.parametrize("text", ["version: 1\n", "log: {level: INFO}\n"])
def test_version_may_be_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    assert settings.load(tmp_path / "settings.yaml") == settings.Settings()


@pytest.mark.parametrize(("num_bytes", "is_read"), [(0, True), (1, False)])
def test_largest_file_that_is_read(tmp_path: Path, num_bytes: int, is_read: bool) -> None:
    head = "log: {level: DEBUG}\n#"
    text = head + "x" * (MAX_FILE_BYTES - len(head) + num_bytes)
    if is_read:
        (tmp_path / "settings.yaml").write_text(text)
        assert settings.load(tmp_path / "settings.yaml").log.level == "DEBUG"
    else:
        assert refusal(tmp_path, text) == "has 1,048,577 bytes; expected at most 1,048,576"


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_bytes("node: {name: Zürich}".encode("utf-16"))
    with pytest.raises(SettingsError, match="can't be read: not UTF-8 text; expected a YAML file"):
        settings.load(tmp_path / "settings.yaml")


def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't be read: Is a directory; expected a YAML file"):
        settings.load(tmp_path)


def test_defaults_are_left_out_of_a_written_file() -> None:
    assert yaml.safe_load(settings.dump(settings.Settings())) == {"version": 1}
    only_name = settings.from_flat({"node_name": "gpu-3", "node_seed": 0}, "test")
    assert yaml.safe_load(settings.dump(only_name)) == {"version": 1, "node": {"name": "gpu-3"}}


_FLAT_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "node_name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
        "node_seed": st.integers(0, 2**63 - 1),
        "node_state_dir": st.text(
            st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=8
        ),
        "trainer_learning_rate": st.floats(0, 1, exclude_min=True),
        "trainer_beta": st.floats(0, 1e300),
        "swarm_port": st.integers(0, 65535),
        "swarm_weights": st.sampled_from(["auto", "on", "off"]),
        "chain_submit_every_minutes": st.none() | st.floats(0.1, 60),
        "account_operators": st.lists(st.text(st.characters(codec="utf-8"), max_size=5)),
        "environment_families": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["bf", "code/lists"])},
                optional={
                    "level": st.sampled_from(["auto", 0, 7, None]),
                    "config": st.dictionaries(
                        st.text("abc", min_size=1),
                        st.one_of(st.booleans(), st.integers(), st.text("0e.~ny:#'\"")),
                        max_size=2,
                    ),
                },
            ),
            min_size=1,
            max_size=3,
        ),
    },
)


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(flat=_FLAT_VALUES)
def test_what_is_written_is_read_again(
    flat: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Texts that YAML takes for numbers, dates or truth values stay texts."""
    before = settings.from_flat(flat, "test")
    file = tmp_path_factory.getbasetemp() / "again.yaml"
    file.write_text(settings.dump(before))
    assert settings.load(file) == before


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
_KEYS = st.sampled_from([*settings.flat_keys(), "node", "node_", "_name", "", "nodename"])


@hypothesis_settings(max_examples=100, deadline=None, database=None)
@given(flat=st.dictionaries(_KEYS, _ANYTHING, max_size=3))
def test_values_of_any_type_are_settings_or_mistakes(flat: dict[str, Any]) -> None:
    mistakes = settings.flat_mistakes(flat)
    if mistakes:
        with pytest.raises(SettingsError) as refused:
            settings.from_flat(flat, "inventory")
        assert str(refused.value) == "inventory: " + "; ".join(mistakes)
        return
    found = settings.from_flat(flat, "inventory").model_dump(mode="json")
    for key, value in flat.items():
        section, _, name = key.partition("_")
        if isinstance(value, str | int | float):
            assert found[section][name] in (value, [value]), json.dumps(flat)

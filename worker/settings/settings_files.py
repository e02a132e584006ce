"""Read and write settings: YAML files of a role, and flat keys of an inventory."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from worker.errors import SettingsError
from worker.settings.explanations import explain_all, unknown_key
from worker.settings.root import SECTIONS, SETTINGS_VERSION, Settings
from worker.settings.value_types import shorten

MAX_FILE_BYTES = 1 << 20


def parse(
    raw: dict[str, Any],
    source: str,
) -> Settings:
    """Check nested settings.

    Raises SettingsError, which names `source` and every mistake with its key, its value and the
    expected value.
    """
    version = raw.get("version", SETTINGS_VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > SETTINGS_VERSION:
        raise SettingsError(
            f"{source}: version: {version} is newer than {SETTINGS_VERSION}, the newest that this"
            " hivewright reads; upgrade hivewright, or write the file with this one"
        )
    try:
        # JSON mode is strict and still reads paths from strings and tuples from lists, as in YAML.
        return Settings.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise SettingsError.of(source, explain_all(error, separator=".")) from None
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{source}: {error}; expected plain YAML values") from None


def from_flat(
    flat: dict[str, Any],
    source: str,
) -> Settings:
    """Check flat inventory keys (`trainer_learning_rate`); mistakes are named by these keys.

    Raises SettingsError as `parse` does.
    """
    if mistakes := flat_mistakes(flat):
        raise SettingsError.of(source, mistakes)
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition("_")
        nested.setdefault(section, {})[name] = value
    return parse(nested, source)


def flat_mistakes(flat: dict[str, Any]) -> list[str]:
    """Return a message for each mistake in flat inventory keys; empty if there is none."""
    nested: dict[str, Any] = {}
    mistakes = []
    for key, value in flat.items():
        section, _, name = key.partition("_")
        if section not in SECTIONS or not name:
            mistakes.append(unknown_key(key, key, flat_keys()))
            continue
        try:
            nested.setdefault(section, {})[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            mistakes.append(
                f"{key}: got {shorten(value)}; expected plain text, numbers, lists and dicts"
            )
    try:
        Settings.model_validate_json(json.dumps(nested))
    except ValidationError as error:
        mistakes += explain_all(error, separator="_")
    return mistakes


def flat_keys() -> list[str]:
    """Return all inventory keys that are settings."""
    return [
        f"{section}_{name}" for section, model in SECTIONS.items() for name in model.model_fields
    ]


def load(path: Path) -> Settings:
    """Read a settings file; raise SettingsError with one line for any mistake in it."""
    source = f"settings file {path}"
    raw = _parse_yaml(_read_text(path, source), source)
    if raw is None:
        raise SettingsError(
            f"{source}: is empty; expected sections such as `node:` (docs/configuration.md lists"
            " them)"
        )
    if not isinstance(raw, dict):
        raise SettingsError(
            f"{source}: got a {type(raw).__name__}; expected sections such as `node:`"
        )
    return parse(raw, source)


def dump(settings: Settings) -> str:
    """Return YAML text from which `load` reads the same settings; defaults are left out."""
    data = settings.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"version": settings.version, **data}, sort_keys=False)


def _read_text(path: Path, source: str) -> str:
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise SettingsError(f"{source}: is a device or a pipe; expected a YAML file")
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise SettingsError(
                f"{source}: has {path.stat().st_size:,} bytes; expected at most {MAX_FILE_BYTES:,}"
            )
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{source}: can't be read: {reason}; expected a YAML file") from None


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise SettingsError(
            f"{source}: is nested too deeply; expected sections such as `node:`"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise SettingsError(f"{source}: not YAML{line}: {problem}") from None


class _UniqueKeys(yaml.SafeLoader):
    """Refuse a duplicate key; plain YAML would silently use the last one.

    A value in the form of a date or a number that does not exist (`2024-02-30`) is a YAMLError.
    """

    def construct_object(
        self,
        node: yaml.Node,
        deep: bool = False,
    ) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            problem = f"{shorten(node.value)} is not a valid {kind}; text needs quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,
    ) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # YAML itself refuses it as a key
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

"""Explain wrong settings in the words of people who write settings and inventories."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from worker.settings.root import SECTIONS
from worker.settings.value_types import ADDRESS_PATTERN, PEER_ID_PATTERN, URL_PATTERN, shorten

# Patterns of text in settings and inventories, in words.
_FORMS = {
    URL_PATTERN: "http:// or https:// and an address",
    ADDRESS_PATTERN: "0x and 40 hexadecimal digits",
    PEER_ID_PATTERN: "a peer id, such as QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": (
        "at most 63 letters, digits, dots, hyphens and underscores, first no dot"
    ),
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$": (
        "at most 63 letters, digits, dots, hyphens and underscores, first a letter or digit"
    ),
    r"^(auto|cpu|cuda(:[0-9]+)?)$": "auto, cpu, cuda, or cuda:0 and so on",
    r"^[^\s/]{1,15}$": "a network interface, such as eth0: at most 15 characters",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$": (
        "owner/name, or owner alone, on the Hugging Face Hub"
    ),
    r"^(pip|(https?|file)://\S+)$": "pip, or a URL of an index (https://, http:// or file://)",
    r"^tag:[A-Za-z][A-Za-z0-9-]*$": "tag: and letters, digits and hyphens, such as tag:gpu",
    r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$": (
        "at most 63 lower-case letters, digits and hyphens, no hyphen at the ends"
    ),
}

# Words of pydantic -> words of an inventory or a settings file.
_PLAIN_WORDS = {
    "a valid array": "a list",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid dictionary": "a dict of keys",
    "an object": "a mapping",
    "a valid string": "text",
    "a valid boolean": "True or False",
    "a valid integer": "a whole number",
    "a valid number": "a number",
}


def form(pattern: str) -> str:
    """Return in words the text that a regular expression matches."""
    return _FORMS.get(pattern, f"text of the form {pattern}")


def plainly(expected: str) -> str:
    """Return pydantic's expectation in the words of an inventory or a settings file."""
    for theirs, ours in _PLAIN_WORDS.items():
        expected = expected.replace(theirs, ours)
    return expected


def explain_all(error: ValidationError, separator: str) -> list[str]:
    """Return a message for each mistake; `separator` joins a section and its key in its name.

    Mistakes that follow from another one are left out: a list is also too short if its only item is
    wrong.
    """
    errors = error.errors()
    places = [e["loc"] for e in errors]
    return [_explain(e, separator) for e in errors if not _has_part(e["loc"], places)]


def unknown_key(
    path: str,
    name: str,
    known: Iterable[str],
    prefix: str = "",
) -> str:
    """Return the message about an unknown key, with the known name that is nearest to `name`."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else "docs/configuration.md lists all keys"
    return f"{path}: not a known key; {hint}"


def _has_part(
    location: tuple[Any, ...],
    others: Iterable[tuple[Any, ...]],
) -> bool:
    depth = len(location)
    return any(len(other) > depth and other[:depth] == location for other in others)


def _explain(error: Any, separator: str) -> str:
    location = [str(part) for part in error["loc"]]
    path = "/".join([separator.join(location[:2]), *location[2:]]) or "settings"
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _explain_unknown(location, path, separator)
    if kind == "value_error":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    if kind == "string_pattern_mismatch":
        expected = form(error["ctx"]["pattern"])
    elif kind == "too_short":
        expected = f"at least {error['ctx']['min_length']} of them"
    else:
        expected = plainly(error["msg"].removeprefix("Input should be "))
    advice = _advice(kind, value, is_yaml=separator != "_")
    return f"{path}: got {shorten(value)}; expected {expected}{advice}"


def _explain_unknown(
    location: list[str],
    path: str,
    separator: str,
) -> str:
    name = location[-1]
    if len(location) == 1:
        return unknown_key(path, name, SECTIONS)
    section = location[0]
    known = SECTIONS[section].model_fields if len(location) == 2 else ()
    return unknown_key(path, name, known, prefix=section + separator)


def _advice(
    kind: str,
    value: Any,
    is_yaml: bool,
) -> str:
    """Return advice on quotes: YAML 1.1 reads 1e-5 as text and 0x... as a number."""
    if kind == "float_type" and isinstance(value, str) and _is_number(value):
        if not is_yaml:
            return "; write it without quotes"
        return "; YAML reads it as text: write it with a point and without quotes, such as 1.0e-5"
    if kind == "string_type" and isinstance(value, int):
        return "; put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

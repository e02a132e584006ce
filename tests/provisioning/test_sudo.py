"""The key that names sudo's password, and sudo's messages.

test_lab_sudo_password.py uses real hosts.
"""

from pathlib import Path
from typing import Any

import pytest

from deploys.pyinfra_ext import sudo


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"_sudo": True, "_sudo_password_file": "FILE"}, None),
        ({"_sudo": True}, None),
        ({"_sudo": True, "_sudo_password": "hunter2"}, None),
        (
            {"_sudo_password_file": "FILE"},
            "_sudo_password_file: is set and _sudo is not; set _sudo to True",
        ),
        (
            {"_sudo": True, "_sudo_password_file": 5},
            "_sudo_password_file: got a value of type int; expected a file on this side",
        ),
        (
            {"_sudo": True, "_sudo_password_file": "/nowhere"},
            "_sudo_password_file: /nowhere: No such file",
        ),
        (
            {"_sudo": True, "_sudo_password_file": "FILE", "_sudo_password": "hunter2"},
            "_sudo_password_file: is set, and _sudo_password too; expected one of them",
        ),
    ],
)
def test_what_is_wrong_with_the_key_is_one_line_without_the_password(
    data: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("two words\n")
    data = {
        key: str(tmp_path / "password") if value == "FILE" else value for key, value in data.items()
    }
    said = list(sudo.mistakes(data))
    assert len(said) == (message is not None)
    assert not said or said[0].startswith(str(message))
    assert "hunter2" not in "".join(said)


@pytest.mark.parametrize(
    ("words", "is_asking"),
    [
        ("sudo: a password is required", True),
        ("sudo-rs: interactive authentication is required", True),
        ("sudo: a terminal is required to read the password; either use the -S option", True),
        ("sudo: sorry, you must have a tty to run sudo", False),
        ("sh: 1: sudo: not found", False),
    ],
)
def test_sudos_words_are_told_apart(words: str, is_asking: bool) -> None:
    said = sudo._refusal("bob", words)
    assert said.startswith("sudo asks for the password of bob: write it into a file") == is_asking
    assert is_asking or words in said

"""Decisions on the operator's side: the commit, from real git repositories, and the token."""

import stat
from pathlib import Path

import pytest
from git_repository import git, make_repository

from deploys import operator
from worker.errors import SettingsError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


def test_branch_tag_and_commit_are_resolved_to_the_commit(repository: Path) -> None:
    two, one = git(repository, "log", "--format=%H").splitlines()
    assert operator.resolve(str(repository), "main", "here") == two
    assert operator.resolve(str(repository), "HEAD", "here") == two
    assert operator.resolve(str(repository), "v1", "here") == one
    assert operator.resolve("no repository is asked", one, "here") == one


def test_unknown_ref_is_named(repository: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        operator.resolve(str(repository), "v2", "inventory data of gpu-3")
    assert (
        str(refused.value)
        == "inventory data of gpu-3: release_ref: got 'v2'; expected a branch, tag or whole commit"
        f" of {repository}"
    )


def test_unreadable_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"^here: release_repository: got '/.*/nothing'; can't be read: .*nothing.*does not ",
    ):
        operator.resolve(str(tmp_path / "nothing"), "main", "here")


def test_origin_is_the_default_repository(repository: Path) -> None:
    with pytest.raises(SettingsError, match="release_repository: not set"):
        operator.origin(repository, "here")
    git(repository, "remote", "add", "origin", "https://git.example.org/h.git")
    assert operator.origin(repository, "here") == "https://git.example.org/h.git"


def test_token_is_kept_for_the_operator_only_and_the_one_before_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "secrets/fleet"
    assert operator.enrolment_token(folder) is None
    token = operator.new_token()
    assert len(token) > 40
    assert operator.keep_token(folder, token) is None
    assert operator.enrolment_token(folder) == token
    aside = operator.keep_token(folder, "another")
    assert aside is not None
    assert (operator.enrolment_token(folder), aside.read_text().strip()) == ("another", token)
    assert stat.S_IMODE((folder / operator.TOKEN_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("enrolment.token", b"\xff\xfe", "not UTF-8 text; expected one word"),
        ("enrolment.token", b"", "is empty; expected one word"),
        ("enrolment.token", b"a b\n", "2 words instead of one; expected one word"),
        ("enrolment.token", None, "Is a directory; expected one word"),
        ("wireguard.json", b'{"a', "no JSON; expected public keys by host"),
        ("wireguard.json", b"[" * 100_000, "no JSON; expected public keys by host"),
        ("wireguard.json", b"[1]", "no JSON of that form; expected public keys by host"),
        ("wireguard.json", b"\xff", "not text; expected public keys by host"),
        ("wireguard.json", None, "Is a directory; expected public keys by host"),
    ],
)
@pytest.mark.usefixtures("usual_recursion_limit")
def test_damaged_file_of_secrets_is_named_before_anything_is_made(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    (message,) = operator.secrets_mistakes(tmp_path)
    assert message.startswith(f"{tmp_path}/{name}: {reason}")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_folder_of_secrets_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert list(operator.secrets_mistakes(tmp_path / "file")) == [
        f"{tmp_path}/file is not a folder; expected one for secrets"
    ]
    assert list(operator.secrets_mistakes(tmp_path / "none")) == []
    (message,) = operator.secrets_mistakes(tmp_path / ("a" * 300))
    assert "File name too long" in message


def test_rotated_token_is_known_as_replaced_so_that_a_host_that_has_it_gets_the_new_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        SettingsError, match=r"enrolment\.token: no such file; nothing to replace; .*fetch-token"
    ):
        operator.rotate_token(tmp_path)
    operator.keep_token(tmp_path, "first")
    new = operator.rotate_token(tmp_path)
    assert operator.enrolment_token(tmp_path) == new != "first"
    assert operator.replaced_tokens(tmp_path) == {operator.fingerprint("first")}

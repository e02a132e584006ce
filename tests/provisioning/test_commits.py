"""The commit of each host, looked up once for each repository and ref."""

from pathlib import Path
from typing import Any

import pytest
from git_repository import git, make_repository

from deploys import operator
from deploys.inventory import commits
from deploys.inventory.host_plan import HostEntry
from worker.errors import SettingsError

SECONDS = 20


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository")


def entry(name: str, **data: Any) -> HostEntry:
    return HostEntry(name, ("workers",), data)


def test_each_repository_and_ref_is_asked_once(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, one = git(repository, "log", "--format=%H").splitlines()
    asked = []
    resolve = operator.resolve

    def counted(url: str, ref: str, source: str, seconds: int) -> str:
        asked.append((ref, source))
        return resolve(url, ref, source, seconds)

    monkeypatch.setattr(operator, "resolve", counted)
    url = str(repository)
    entries = [
        entry("a", release_repository=url),
        entry("b", release_repository=url, release_ref="v1"),
        entry("c", release_repository=url, release_ref="main"),
    ]
    found = commits.look_up(entries, SECONDS)
    assert found == {"a": (url, two), "b": (url, one), "c": (url, two)}
    assert asked == [("main", "inventory data of a, c"), ("v1", "inventory data of b")]


def test_every_mistake_has_a_line_with_its_hosts(repository: Path, tmp_path: Path) -> None:
    url, nowhere = str(repository), str(tmp_path / "nowhere")
    entries = [
        entry("a", release_repository=url, release_ref="v9"),
        entry("b", release_repository=nowhere),
        entry("c", release_repository=url),
        entry("d", release_repository=url, release_ref="v9"),
    ]
    with pytest.raises(SettingsError) as refused:
        commits.look_up(entries, SECONDS)
    of_ref, of_repository = str(refused.value).splitlines()
    assert of_ref == (
        "inventory data of a, d: release_ref: got 'v9'; expected a branch, tag or whole commit of"
        f" {url}"
    )
    assert of_repository.startswith(
        f"inventory data of b: release_repository: got {nowhere!r}; can't be read: "
    )


@pytest.mark.parametrize(
    "data",
    [
        {"release_repository": 7},
        {"release_repository": ["https://git.example.org"]},
        {"release_ref": None},
        {"release_ref": 1.5},
        {"release_repository": "https://me:secret@git.example.org/h.git"},
    ],
)
def test_data_that_other_checks_report_are_passed_over(data: dict[str, Any]) -> None:
    assert commits.look_up([entry("a", **data)], SECONDS) == {}


def test_origin_of_the_checkout_is_the_default(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_repository(tmp_path / "checkout")
    git(checkout, "remote", "add", "origin", str(repository))
    monkeypatch.setattr(commits, "CHECKOUT", checkout)
    (two, _) = git(repository, "log", "--format=%H").splitlines()
    assert commits.look_up([entry("a")], SECONDS) == {"a": (str(repository), two)}


def test_password_in_origin_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = make_repository(tmp_path / "checkout")
    git(checkout, "remote", "add", "origin", "https://me:hunter2@git.example.org/h.git")
    monkeypatch.setattr(commits, "CHECKOUT", checkout)
    with pytest.raises(SettingsError) as refused:
        commits.look_up([entry("a"), entry("b")], SECONDS)
    assert str(refused.value).startswith(
        f"inventory data of a, b: release_repository: not set, and origin of {checkout} has a name"
        " or password in its URL"
    )
    assert "hunter2" not in str(refused.value)


def test_whole_commit_is_taken_without_asking(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    data = {"release_repository": nowhere, "release_ref": "a" * 40}
    assert commits.look_up([entry("a", **data)], SECONDS) == {"a": (nowhere, "a" * 40)}

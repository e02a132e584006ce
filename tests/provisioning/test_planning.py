"""Plans of a run: made of the inventory, handed to the runs that follow, and compared by facts."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api.host import Host
from pyinfra_hosts import host

from deploys import operator
from deploys.inventory import planning
from worker.errors import SettingsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Begin a run without plans, whose folder of secrets is a temporary one."""
    for name in ("_planned", "_token_to_keep", "_targets"):
        monkeypatch.setattr(planning, name, {})
    monkeypatch.setattr(planning, "_coordinators", [])
    return tmp_path / "secrets"


def worker(name: str, secrets: Path, /, **data: Any) -> Host:
    own = {
        "slots": 1,
        "swarm_enabled": False,
        "release_repository": "https://git.example.org/h.git",
        "release_ref": COMMIT,
        "secrets_dir": str(secrets),
    }
    return host(name, **(own | data))


def plans() -> dict[str, planning.Planned]:
    return dict(planning._planned)


def test_mistakes_of_all_checks_are_named_at_once(secrets: Path) -> None:
    secrets.mkdir()
    (secrets / "enrolment.token").write_text("two words\n")
    hosts = [
        worker("a", secrets, ssh_port=0),
        worker("b", secrets, trainer_beta="x"),
        worker("c", secrets, slots=10**5000, ssh_port=10**5000),
        worker("d", secrets, slots=[{"chain_account_url": "https://me:secret@192.0.2.1"}]),
    ]
    with pytest.raises(SettingsError) as refused:
        planning.make(hosts)
    lines = str(refused.value).splitlines()
    assert lines[:4] == [
        "inventory data of a: ssh_port: got 0; expected a port from 1 to 65535",
        "inventory data of c: slots: a number of more than 300 digits; expected a smaller one",
        "inventory data of c: ssh_port: a number of more than 300 digits; expected a smaller one",
        "inventory data of b: trainer_beta: got 'x'; expected a number",
    ]
    assert "enrolment.token" in lines[4]
    assert "two words" not in str(refused.value)
    assert plans() == {}


def test_password_of_a_slot_is_refused_and_not_shown(secrets: Path) -> None:
    slots = [{}, {"chain_account_url": "https://me:hunter2@192.0.2.1"}]
    with pytest.raises(SettingsError) as refused:
        planning.make([worker("a", secrets, slots=slots)])
    (line,) = str(refused.value).splitlines()
    assert line.startswith("inventory data of a: slot 1: chain_account_url: has a name or password")
    assert "hunter2" not in line


def test_plan_has_commit_targets_and_no_token_without_a_coordinator(secrets: Path) -> None:
    planning.make([worker("a", secrets, metrics_port=9400), worker("b", secrets)])
    found = plans()
    assert list(found) == ["a", "b"]
    assert {planned.commit for planned in found.values()} == {COMMIT}
    assert [target.host for target in found["b"].targets] == ["a"]
    assert found["a"].token is None
    assert not secrets.exists()


def test_token_of_this_side_is_in_all_plans(secrets: Path) -> None:
    operator.keep_token(secrets, "a-token")
    planning.make([worker("a", secrets), worker("b", secrets)])
    assert [planned.token for planned in plans().values()] == ["a-token"] * 2


def test_plans_are_handed_on_without_the_token(secrets: Path, tmp_path: Path) -> None:
    operator.keep_token(secrets, "a-token")
    hosts = [worker("a", secrets, slots=2, metrics_port=9400), worker("b", secrets, wireguard=True)]
    planning.make(hosts)
    made, folder = plans(), tmp_path / "plans"
    folder.mkdir()
    planning.hand_on(folder)
    assert "a-token" not in "".join(file.read_text() for file in folder.iterdir())
    planning._planned.clear()
    planning.take_over(folder, hosts)
    assert plans() == made


def test_run_for_one_host_takes_its_plan_only_and_its_own_commit(
    secrets: Path, tmp_path: Path
) -> None:
    planning.make([worker("a", secrets), worker("b", secrets)])
    planning.hand_on(tmp_path)
    planning._planned.clear()
    planning.take_over(tmp_path, [worker("b", secrets, release_ref=OTHER)])
    assert {name: planned.commit for name, planned in plans().items()} == {"b": OTHER}
    planning.take_over(tmp_path, [worker("b", secrets, release_ref="main")])
    assert plans()["b"].commit == COMMIT


def test_host_that_came_after_the_plans_is_refused(secrets: Path, tmp_path: Path) -> None:
    planning.make([worker("a", secrets)])
    planning.hand_on(tmp_path)
    with pytest.raises(SettingsError) as refused:
        planning.take_over(tmp_path, [worker("c", secrets), worker("a", secrets, ssh_port=0)])
    assert str(refused.value).splitlines() == [
        "inventory data of a: ssh_port: got 0; expected a port from 1 to 65535",
        "c: was not in the inventory when this began",
    ]


def test_coordinator_makes_a_token_only_when_hosts_are_changed(secrets: Path) -> None:
    hub = worker("hub", secrets, account_host="192.0.2.1", swarm_enabled=True)
    hub.groups.append("coordinators")
    planning.make([hub], is_dry=True)
    assert plans()["hub"].token is not None
    assert planning._token_to_keep == {}
    planning.make([hub])
    assert list(planning._token_to_keep.values()) == [plans()["hub"].token]
    # It is written after the hosts have shown that none of them has another one.
    assert not secrets.exists()


def test_names_of_plans_are_safe_as_names_of_files(secrets: Path, tmp_path: Path) -> None:
    names = ["@ssh/gpu-1", "gpu/../1", "a" * 300]
    planning.make(
        [worker(name, secrets, ssh_hostname=f"192.0.2.{n}") for n, name in enumerate(names)]
    )
    folder = tmp_path / "plans"
    folder.mkdir()
    planning.hand_on(folder)
    assert len(list(folder.iterdir())) == len(names) + 1
    assert json.loads((folder / "coordinators.json").read_text()) == []


def test_review_reports_mistakes_and_makes_no_plans(secrets: Path) -> None:
    hosts = [worker("a", secrets, trainer_beta="x", ssh_port=0), worker("b", secrets)]
    assert planning.review(hosts) == [
        "inventory data of a: ssh_port: got 0; expected a port from 1 to 65535",
        "inventory data of a: trainer_beta: got 'x'; expected a number",
    ]
    assert planning.review([worker("b", secrets)]) == []
    assert plans() == {}


def test_review_refuses_what_pyinfra_would_end_at(secrets: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        planning.review([worker("a", secrets, ssh_port="x"), worker("b", secrets, _sudo=1)])
    assert str(refused.value).splitlines() == [
        "inventory data of a: ssh_port: got 'x'; expected int",
        "inventory data of b: _sudo: got 1; expected bool",
    ]

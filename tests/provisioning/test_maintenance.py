"""`hivewright fleet ...` as an operator runs it; the hosts are stand-ins."""

import argparse
import base64
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from nacl.public import PrivateKey

from deploys import backup_pack, coordinator_host, paths, worker
from deploys import maintenance as operations
from deploys.fleet import backup_file, commands, restore_command
from deploys.fleet.pyinfra_process import Ran
from deploys.fleet_facts import Logs, NodeReports
from deploys.paths import (
    CACHE,
    COMMAND,
    CONFIGURATION,
    DEPLOYED,
    LOGS,
    RETIRED,
    ROOT,
    STATE,
    WHOLE,
    settings_file,
)
from deploys.services import COORDINATOR_ROLES, COORDINATOR_UNITS
from tests import preloaded
from worker.errors import SettingsError, WorkerError

CHECKOUT = Path(__file__).parents[2]
PASSPHRASE = "correct horse"
WORKER = {"slots": 1, "swarm_enabled": False}
NOBODY = {"ssh_hostname": "127.0.0.1", "ssh_port": 1}


def hivewright(*arguments: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from worker import cli; cli.main(sys.argv[1:])"
    env = {
        "PYTHONPATH": str(CHECKOUT),
        "PATH": "/usr/bin:/bin",
        "COLUMNS": "80",
        "HOME": str(cwd),
    }
    command = [sys.executable, "-c", code, *arguments]
    return preloaded.run(command, "deploys.fleet.commands", cwd=cwd, env=env, timeout=90)


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        (
            "rollout",
            "TYPO",
            "TYPO: no such file; expected an inventory file, a copy of inventory/example.py",
        ),
        (
            "fleet stop",
            "TYPO",
            "TYPO: no such file; expected an inventory file, a copy of inventory/example.py",
        ),
        ("fleet status", "flet.py", "flet.py: no such file; did you mean fleet.py?"),
        ("fleet logs", "nowhere/x", "nowhere/x: no such file; expected an inventory file"),
        ("fleet status", "folder", "folder: is not a file; expected an inventory file"),
        (
            "fleet start",
            "empty.py",
            "empty.py: no hosts; expected lists of hosts, named coordinators and workers",
        ),
        ("fleet status", "fleet.py", "fleet.py line 1: '[' was never closed; expected Python"),
    ],
)
def test_what_is_no_inventory_is_refused_in_a_line(
    command: str, name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "fleet.py").write_text("workers = [")
    (tmp_path / "empty.py").write_text("workers = []\n")
    done = hivewright(*command.split(), name, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    ("command", "done_by"),
    [
        ("stop", "systemctl stop $units"),
        ("start", "systemctl start $units"),
        ("restart", "systemctl restart $units"),
        ("rollback", "no earlier deploy is kept on this host"),
    ],
)
def test_command_is_run_on_every_host_and_says_of_each_what_came_of_it(
    command: str, done_by: str, tmp_path: Path
) -> None:
    """An operation that fails on one host succeeds on the others."""
    answers = {"uname -s": "Linux", done_by: {"success": False, "stderr": "it does not"}}
    hosts = [
        (
            f"@fake/gpu-{number}",
            {**WORKER, "fake_delay": 0.0, "fake_delay_jitter": 0.0, "fake_responses": answers},
        )
        for number, answers in enumerate([answers, {"uname -s": "Linux"}])
    ]
    (tmp_path / "fleet.py").write_text(f"workers = {hosts!r}\n")
    done = hivewright("fleet", command, "fleet.py", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    ill, well = sorted(done.stdout.splitlines())
    assert ill.startswith("@fake/gpu-0: failed, ")
    assert ill.endswith(": it does not")
    assert well == "@fake/gpu-1: done"
    *before, last = done.stderr.splitlines()
    assert last.endswith("not done on @fake/gpu-0; see above")
    assert [line for line in before if not line.startswith("waiting for @fake/gpu-")] == []


def test_command_is_run_on_the_hosts_of_its_limit(tmp_path: Path) -> None:
    quick = {"fake_delay": 0.0, "fake_delay_jitter": 0.0, "fake_responses": {"uname -s": "Linux"}}
    hosts = [(f"@fake/gpu-{number}", {**WORKER, **quick}) for number in range(2)]
    (tmp_path / "fleet.py").write_text(f"workers = {hosts!r}\n")
    done = hivewright("fleet", "stop", "fleet.py", "--limit", "*-1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "@fake/gpu-1: done\n"), done.stderr


def test_status_and_logs_say_why_a_host_gives_no_answer(tmp_path: Path) -> None:
    (tmp_path / "fleet.py").write_text(f"workers = {[('gpu-1', WORKER | NOBODY)]!r}\n")
    reason = "Could not connect ([Errno None] Unable to connect to port 1 on 127.0.0.1)"
    shown = hivewright("fleet", "status", "fleet.py", cwd=tmp_path)
    assert (shown.returncode, shown.stdout.splitlines()[-1]) == (
        1,
        f"gpu-1: {reason}",
    ), shown.stderr
    told = hivewright("fleet", "status", "fleet.py", "--json", cwd=tmp_path)
    assert told.returncode == 1
    expected = {
        "host": None,
        "services": None,
        "expected": ["hivewright-worker@0.service"],
        "notes": [],
    }
    assert json.loads(told.stdout) == {"gpu-1": expected | {"reason": reason}}
    logs = hivewright("fleet", "logs", "fleet.py", cwd=tmp_path)
    assert (logs.returncode, f"no answer from gpu-1 ({reason})" in logs.stderr) == (1, True)


@pytest.mark.parametrize("command", ["status", "logs", "stop", "rollback"])
def test_mistakes_that_a_deploy_would_refuse_are_named_and_the_work_is_done(
    command: str, tmp_path: Path
) -> None:
    wrong = WORKER | {"trainer_learning_rat": 1, "slots": -1}
    (tmp_path / "fleet.py").write_text(
        f"workers = {[('@local', wrong), ('gpu-2', WORKER | NOBODY)]!r}\n"
    )
    done = hivewright("fleet", command, "fleet.py", "--limit", "gpu-2", cwd=tmp_path)
    assert (done.returncode, "gpu-2" in done.stdout + done.stderr) == (1, True)
    assert [line for line in done.stderr.splitlines() if "warning" in line] == [
        (
            "warning: a deploy would refuse inventory data of @local: slots: got -1; expected auto,"
            " a count of at least 1, or a list with a dict of settings for each"
        ),
        (
            "warning: a deploy would refuse inventory data of @local: trainer_learning_rat: not a"
            " known key; did you mean trainer_learning_rate?"
        ),
    ]


def test_host_that_pyinfra_fails_at_does_not_cost_the_logs_of_the_others(tmp_path: Path) -> None:
    hosts = [
        ("gpu-1", WORKER | {"ssh_hostname": "127.0.0.1", "ssh_key": "/nowhere/key"}),
        ("@local", WORKER),
    ]
    (tmp_path / "fleet.py").write_text(f"workers = {hosts!r}\n")
    done = hivewright("fleet", "logs", "fleet.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "no answer from gpu-1 (" in done.stderr.splitlines()[-1]
    assert (
        "No such private key file: /nowhere/key); the others are done"
        in done.stderr.splitlines()[-1]
    )


def test_data_that_pyinfra_itself_would_end_at_are_refused_in_a_line_each(tmp_path: Path) -> None:
    hosts = [("gpu-1", WORKER | {"ssh_port": "22"}), ("gpu-2", WORKER | {"ssh_user": 7})]
    (tmp_path / "fleet.py").write_text(f"workers = {hosts!r}\n")
    done = hivewright("fleet", "status", "fleet.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "inventory data of gpu-1: ssh_port: got '22'; expected int" in done.stderr
    assert "inventory data of gpu-2: ssh_user: got 7; expected str" in done.stderr


LINE = "2026-01-01T10:00:00+0000 hivewright-worker@0[1]: round finished"


@pytest.mark.parametrize(
    ("unit", "lines", "code", "message"),
    [
        (
            "workr@0",
            "",
            2,
            "--unit workr@0: no such service on @fake/gpu-0; did you mean worker@0?",
        ),
        ("x", "", 2, "--unit x: no such service on @fake/gpu-0; these hosts have keeper, worker@0"),
        ("worker@*", "", 0, ""),
        ("worker@0", LINE, 0, ""),
    ],
)
def test_logs_of_a_service_that_nobody_has_are_refused_and_those_of_a_quiet_one_are_not(
    unit: str, lines: str, code: int, message: str, tmp_path: Path
) -> None:
    reports = "unit=hivewright-worker@0.service\nunit=hivewright-keeper.service\nend"
    asked = Logs().command(50, f"hivewright-{unit}.service")
    answers = {asked: f"{lines}\nend".strip(), NodeReports().command(): reports}
    data = {**WORKER, "fake_delay": 0.0, "fake_delay_jitter": 0.0, "fake_responses": answers}
    (tmp_path / "fleet.py").write_text(f"workers = {[('@fake/gpu-0', data)]!r}\n")
    done = hivewright("fleet", "logs", "fleet.py", "--unit", unit, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    shown = "@fake/gpu-0/worker@0 2026-01-01T10:00:00+0000 round finished\n"
    assert done.stdout == (shown if lines else "")
    assert message in done.stderr


OF_HOSTS = r"(?<![\w.$@-])(/(?:opt|var|etc|run|usr/local)\b)"
STAND_INS = {
    "systemctl": 'echo "$@" >> $LOG; [ "$1" != "$FAILS" ]',
    "tailscale": "exit 1",
    "id": "exit 1",
    "userdel": "exit 1",
    "install": 'for folder; do :; done; mkdir -p "$folder"',
    "runuser": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
}
KEPT = (
    "worker-0/swarm.pem",
    "worker-0/enrolment.json",
    "worker-0/ledger.db",
    "keeper/owner.key",
    "chain/state.json",
    "retired/worker-3-20260101T000000/swarm.pem",
)
MADE_AGAIN = (
    STATE / "worker-0/status.json",
    STATE / "worker-0/checkpoints/1/weights",
    STATE / "elsewhere/x",
    COMMAND,
    DEPLOYED / WHOLE,
    DEPLOYED / "hivewright-worker@0.service",
    CONFIGURATION / "worker-0.yaml",
    ROOT / "current/x",
    CACHE / "x",
    LOGS / "x.log",
    Path("/etc/systemd/system/hivewright-worker@.service"),
)
OTHERS = Path("/etc/systemd/system/ssh.service")


def run_below(root: Path, commands: Iterable[Any], fails: str = "none") -> None:
    """Run an operation's commands with a host's folders below `root` and stand-in programs.

    `fails`: the action of systemctl that fails.
    """
    programs = root / "programs"
    programs.mkdir(exist_ok=True)
    (root / "run").mkdir(exist_ok=True)
    for name, script in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    for command in commands:
        script = re.sub(OF_HOSTS, lambda found: f"{root}{found[1]}", str(command))
        assert not re.search(r"(?<![\w.])/(?!dev/null)\w", script.replace(str(root), "ROOT")), (
            script
        )
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "LOG": str(root / "log"),
            "FAILS": fails,
        }
        subprocess.run(["sh", "-c", script], env=environment, check=True, timeout=60)


def below(root: Path, file: Path) -> Path:
    return root / file.relative_to("/")


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    for file in (*(STATE / kept for kept in KEPT), *MADE_AGAIN, OTHERS):
        below(tmp_path, file).parent.mkdir(parents=True, exist_ok=True)
        below(tmp_path, file).write_text("x")
    return tmp_path


def files_below(root: Path) -> set[str]:
    left = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
    return {file for file in left if not file.startswith("programs/")} - {"log"}


def test_uninstall_leaves_what_can_not_be_made_again_and_nothing_else(deployed: Path) -> None:
    run_below(deployed, operations.uninstall._inner(identities=False))
    left = {str((STATE / kept).relative_to("/")) for kept in KEPT} | {str(OTHERS.relative_to("/"))}
    assert files_below(deployed) == left
    assert "disable --now --quiet hivewright-worker@0.service" in (deployed / "log").read_text()


def test_uninstall_with_identities_leaves_nothing(deployed: Path) -> None:
    run_below(deployed, operations.uninstall._inner(identities=True))
    assert files_below(deployed) == {str(OTHERS.relative_to("/"))}
    assert not below(deployed, STATE).exists()


def test_move_away_and_back_leaves_a_worker_as_it_was(deployed: Path) -> None:
    before = {file: (deployed / file).read_text() for file in files_below(deployed)}
    run_below(deployed, operations.retire._inner())
    assert not below(deployed, STATE / "worker-0/swarm.pem").exists()
    assert not below(deployed, DEPLOYED / WHOLE).exists()
    assert below(deployed, STATE / "worker-0/ledger.db").exists()
    run_below(deployed, operations.take_back._inner())
    assert {file: (deployed / file).read_text() for file in files_below(deployed)} == before
    log = (deployed / "log").read_text().splitlines()
    unit = "hivewright-worker@0.service"
    assert [line for line in log if unit in line] == [
        f"is-active --quiet {unit}",
        f"disable --now --quiet {unit}",
        f"enable --quiet {unit}",
        f"start {unit}",
    ]


class AnsweringHost:
    """Stands in for pyinfra's host: one fact, and the reason of a no-op."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.noops: list[str] = []

    def get_fact(self, fact: Any) -> Any:
        return self._answer

    def noop(self, reason: str) -> None:
        self.noops.append(reason)


UNITS = list(COORDINATOR_UNITS)


@pytest.fixture
def coordinating(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a worker and a coordinator whose inventory has no coordinator any more."""
    own = (*(paths.UNITS / unit for unit in UNITS), *(DEPLOYED / unit for unit in UNITS))
    settings = (settings_file(role) for role in COORDINATOR_ROLES)
    kept = (STATE / role / "own" for role in COORDINATOR_ROLES)
    for file in (*own, *settings, *kept, CACHE / "chain/x", LOGS / "keeper/x.log"):
        below(deployed, file).parent.mkdir(parents=True, exist_ok=True)
        below(deployed, file).write_text(file.parent.name)
    monkeypatch.setattr(coordinator_host, "host", AnsweringHost(list(COORDINATOR_ROLES)))
    return deployed


def test_host_that_is_no_coordinator_any_more_runs_nothing_of_it_and_keeps_its_state(
    coordinating: Path,
) -> None:
    run_below(coordinating, coordinator_host.retire._inner())
    (kept,) = below(coordinating, RETIRED).glob("coordinator-*")
    assert kept.stat().st_mode & 0o777 == 0o700
    assert {folder.name for folder in kept.iterdir()} == set(COORDINATOR_ROLES)
    assert {(kept / role / "own").read_text() for role in COORDINATOR_ROLES} == set(
        COORDINATOR_ROLES
    )
    assert (kept / "keeper/owner.key").exists()
    left = files_below(coordinating)
    theirs = [file for file in left if any(f"/{role}" in file for role in COORDINATOR_ROLES)]
    assert [file for file in theirs if "/coordinator-" not in file] == []
    assert not [file for file in left if Path(file).name in UNITS]
    # The worker of this host is not touched.
    worker_unit = DEPLOYED / "hivewright-worker@0.service"
    for file in (STATE / "worker-0/swarm.pem", worker_unit, CONFIGURATION / "worker-0.yaml"):
        assert below(coordinating, file).exists(), file
    log = (coordinating / "log").read_text().splitlines()
    assert log == [*(f"disable --now --quiet {unit}" for unit in reversed(UNITS)), "daemon-reload"]


def test_service_without_a_task_is_stopped_and_its_state_kept(coordinating: Path) -> None:
    others = [role for role in COORDINATOR_ROLES if role != "judge"]
    before = files_below(coordinating)
    run_below(coordinating, coordinator_host.stop_unused._inner(roles=others))
    unit = "hivewright-judge.service"
    gone = (paths.UNITS / unit, DEPLOYED / unit, settings_file("judge"))
    assert before - files_below(coordinating) == {str(file.relative_to("/")) for file in gone}
    log = (coordinating / "log").read_text().splitlines()
    assert log == [f"disable --now --quiet {unit}", "daemon-reload"]


def test_service_with_a_task_is_left_alone(coordinating: Path) -> None:
    assert not [*coordinator_host.stop_unused._inner(roles=list(COORDINATOR_ROLES))]


def test_service_that_does_not_stop_is_tried_again_by_the_next_run(coordinating: Path) -> None:
    before = files_below(coordinating)
    with pytest.raises(subprocess.CalledProcessError):
        run_below(coordinating, coordinator_host.stop_unused._inner(roles=[]), fails="disable")
    assert set(before) <= set(files_below(coordinating))


def test_coordinator_that_does_not_stop_loses_nothing(coordinating: Path) -> None:
    before = files_below(coordinating)
    with pytest.raises(subprocess.CalledProcessError):
        run_below(coordinating, coordinator_host.retire._inner(), fails="disable")
    assert files_below(coordinating) == before


def test_host_without_services_has_none_to_retire(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = AnsweringHost([])
    monkeypatch.setattr(coordinator_host, "host", bare)
    assert list(coordinator_host.retire._inner()) == []
    assert bare.noops == ["no service of a coordinator is configured"]


def test_worker_that_the_inventory_no_longer_has_is_stopped_and_its_identity_kept(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_other = (STATE / "worker-1/swarm.pem", CONFIGURATION / "worker-1.yaml")
    for file in of_other:
        below(deployed, file).parent.mkdir(parents=True, exist_ok=True)
        below(deployed, file).write_text("x")
    monkeypatch.setattr(worker, "host", AnsweringHost([0, 1]))
    run_below(deployed, worker.retire._inner(numbers=[1]))
    (kept,) = below(deployed, RETIRED).glob("worker-0-*")
    assert files_below(kept) == {"swarm.pem", "enrolment.json", "ledger.db"}
    assert not below(deployed, STATE / "worker-0").exists()
    assert not below(deployed, CONFIGURATION / "worker-0.yaml").exists()
    assert not below(deployed, DEPLOYED / "hivewright-worker@0.service").exists()
    assert all(below(deployed, file).exists() for file in of_other)
    log = (deployed / "log").read_text().splitlines()
    assert log == ["disable --now --quiet hivewright-worker@0.service", "daemon-reload"]


def test_only_the_service_that_is_named_is_stopped(deployed: Path) -> None:
    below(deployed, DEPLOYED / "hivewright-keeper.service").write_text("x")
    run_below(deployed, operations.services._inner(action="stop", unit="worker@*"))
    assert (deployed / "log").read_text().splitlines()[-1] == "stop hivewright-worker@0.service"
    with pytest.raises(subprocess.CalledProcessError):
        run_below(deployed, operations.services._inner(action="stop", unit="workr@0"))


class RecordedPyinfra:
    """Stands in for pyinfra and two hosts; `outcomes`: results of operations, by name."""

    inventory = "fleet.py"

    def __init__(self, **outcomes: Ran) -> None:
        self.outcomes = outcomes
        self.done: list[tuple[str, str, bytes | None]] = []

    def of_operator(self, inventory: str) -> "RecordedPyinfra":
        return self

    def hosts(self, *, timeout: float) -> list[dict[str, Any]]:
        return [{"name": name, "groups": ["workers"]} for name in ("gpu-1", "gpu-9")]

    def operation(
        self,
        host: str,
        name: str,
        log: Path,
        *arguments: str,
        timeout: float,
        stdin: str | None = None,
    ) -> Ran:
        name = name.rpartition(".")[2]
        sent = None
        if name == "check_restore":
            with tarfile.open(fileobj=io.BytesIO(base64.b64decode(stdin or ""))) as tar:
                sent = ",".join(tar.getnames()).encode()
        elif name == "restore":
            key = PrivateKey(bytes.fromhex(stdin or ""))
            with Path(arguments[0].removeprefix("file=")).open("rb") as stream:
                sent = b"".join(backup_pack.opened(stream, key))
        self.done.append((host, name, sent))
        return self.outcomes.get(name, Ran("done"))


def restore(
    hosts: RecordedPyinfra,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
    to: str,
) -> None:
    monkeypatch.setattr(commands, "Pyinfra", hosts)
    file = folder / "fleet.backup"
    if not file.exists():
        tars = {
            host: backup_file.Tar(len(tar_of(host)), [tar_of(host)]) for host in ("gpu-1", "gone")
        }
        backup_file.write(file, tars, PASSPHRASE)
        (folder / "passphrase").write_text(f"{PASSPHRASE}\n")
    restore_command.restore(
        argparse.Namespace(
            inventory="fleet.py",
            archive=file,
            passphrase_file=folder / "passphrase",
            source=source,
            to=to,
        )
    )


@cache
def tar_of(host: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("worker-0/swarm.pem", "worker-0/ledger.db", "keeper/owner.key"):
            entry = tarfile.TarInfo(name)
            entry.size = len(host)
            tar.addfile(entry, io.BytesIO(host.encode()))
    return stream.getvalue()


ASKED = b"worker-0/swarm.pem"


def test_restore_to_another_host_is_a_move_whose_old_host_gives_its_keys_up_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = RecordedPyinfra()
    restore(hosts, tmp_path, monkeypatch, "gpu-1", "gpu-9")
    assert hosts.done == [
        ("gpu-9", "check_restore", ASKED),
        ("gpu-1", "retire", None),
        ("gpu-9", "restore", tar_of("gpu-1")),
    ]
    said = capsys.readouterr().out
    assert "gpu-1: stopped, its keys set aside; take its slots out of the inventory" in said
    assert "gpu-9: has the identities and ledgers of gpu-1; deploy it now" in said


def test_restore_to_the_same_host_retires_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = RecordedPyinfra()
    restore(hosts, tmp_path, monkeypatch, None, "gpu-1")
    assert hosts.done == [("gpu-1", "check_restore", ASKED), ("gpu-1", "restore", tar_of("gpu-1"))]


@pytest.mark.parametrize(
    ("source", "outcomes", "warning"),
    [
        (
            "gone",
            {},
            (
                "gone: not in the inventory; if it comes back, it must not run with the identities"
                " that have moved"
            ),
        ),
        (
            "gpu-1",
            {"retire": Ran("unreachable", "can't be reached")},
            "gpu-1: can't be reached; if it comes back",
        ),
    ],
)
def test_move_from_a_host_that_is_gone_goes_on_with_a_warning(
    source: str,
    outcomes: dict[str, Ran],
    warning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hosts = RecordedPyinfra(**outcomes)
    restore(hosts, tmp_path, monkeypatch, source, "gpu-9")
    assert hosts.done[-1] == ("gpu-9", "restore", tar_of(source))
    assert warning in capsys.readouterr().out


def test_move_whose_old_host_keeps_its_keys_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = RecordedPyinfra(retire=Ran("failed", "does not stop"))
    with pytest.raises(WorkerError, match="gpu-1: does not stop; nothing was moved"):
        restore(hosts, tmp_path, monkeypatch, "gpu-1", "gpu-9")
    # What it may have set aside before it failed it gets back.
    assert [(host, name) for host, name, _ in hosts.done] == [
        ("gpu-9", "check_restore"),
        ("gpu-1", "retire"),
        ("gpu-1", "take_back"),
    ]


def test_move_that_the_target_would_refuse_touches_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = RecordedPyinfra(check_restore=Ran("failed", "slot 0 has an identity of its own"))
    with pytest.raises(
        WorkerError, match="gpu-9: slot 0 has an identity of its own; nothing was done on any host"
    ):
        restore(hosts, tmp_path, monkeypatch, "gpu-1", "gpu-9")
    assert [(host, name) for host, name, _ in hosts.done] == [("gpu-9", "check_restore")]


def test_move_that_fails_at_the_target_is_undone_at_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = RecordedPyinfra(restore=Ran("failed", "No space left on device"))
    with pytest.raises(
        WorkerError, match=r"gpu-9: No space left .* gpu-1 has its keys again, and runs as before"
    ):
        restore(hosts, tmp_path, monkeypatch, "gpu-1", "gpu-9")
    assert [(host, name) for host, name, _ in hosts.done][-1] == ("gpu-1", "take_back")
    hosts = RecordedPyinfra(
        restore=Ran("failed", "No space"), take_back=Ran("unreachable", "can't be reached")
    )
    with pytest.raises(WorkerError, match=r"fleet take-back fleet\.py --limit gpu-1` tries again"):
        restore(hosts, tmp_path, monkeypatch, "gpu-1", "gpu-9")


@pytest.mark.parametrize(
    ("source", "to", "message"),
    [
        (None, "gpu-7", "--to gpu-7: no such host in fleet.py"),
        ("gpu-9", "gpu-1", "--from gpu-9: not in .*; it has gone, gpu-1"),
    ],
)
def test_restore_of_nobody_or_to_nobody_is_refused_before_any_host_is_touched(
    source: str | None, to: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = RecordedPyinfra()
    with pytest.raises(SettingsError, match=message):
        restore(hosts, tmp_path, monkeypatch, source, to)
    assert hosts.done == []

"""The facts of this project, from recorded answers of hosts."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api.exceptions import FactProcessError

from deploys.facts import (
    ChosenModels,
    ConfiguredSlots,
    DamagedEnrolments,
    Deploys,
    FileContent,
    Identities,
    InstalledPackages,
    InstalledReleases,
    OwnFact,
    PastDeploys,
    Releases,
    Service,
    ServiceState,
    SystemdVersion,
    UserEntry,
)
from deploys.fleet_facts import Footprint, HostStates, Logs, NodeReports, last_words
from deploys.paths import ANVILS, CONFIGURATION, ENVIRONMENTS, STATE
from deploys.tailscale.join import TailnetOfHost
from tests.runtime.test_gpu_health import recording

CHECKOUT = Path(__file__).parents[2]

STATUS: dict[str, Any] = {
    "peer_id": "Qm",
    "state": "a=b",
    "round": 3,
    "reward_mean": None,
    "peers_heard": 0,
    "ledger": {},
    "animal_name": "tall owl",
    "updated_at": 1795443940.5,
    "swarm": {"peers_known": 2, "address": "x"},
}

WHAT = "what=regular file,300"


def test_releases_and_what_they_use() -> None:
    found = Releases().process(
        [
            "current bbb",
            "release bbb /opt/hivewright/environments/e1 /opt/hivewright/anvil/a1",
            "release aaa /opt/hivewright/environments/e1",
            "release ccc",
            "folder /opt/hivewright/environments/e1",
            "folder /opt/hivewright/environments/e0",
        ]
    )
    assert found.current == "bbb"
    assert list(found.parts) == ["bbb", "aaa", "ccc"]
    assert found.has("bbb", ANVILS)
    assert not found.has("aaa", ANVILS)
    assert not found.has("ccc", ENVIRONMENTS)
    assert found.folders == {ENVIRONMENTS / "e0", ENVIRONMENTS / "e1"}


def test_bare_host_has_no_releases() -> None:
    assert Releases().process(["current"]) == InstalledReleases()


def test_identities_by_slot() -> None:
    lines = [
        '/var/lib/hivewright/worker-0/enrolment.json {"peer_id": "Qm0"}',
        '/x/worker-12/enrolment.json {"peer_id": "Qm1"}',
    ]
    assert Identities().process(lines) == {0: "Qm0", 12: "Qm1"}


@pytest.mark.parametrize("text", ["", '{"peer_', "[]", "{}", '{"peer_id": 7}', "[" * 100_000])
@pytest.mark.usefixtures("usual_recursion_limit")
def test_damaged_enrolment_is_no_identity_and_is_named(text: str) -> None:
    lines = [
        f"/var/lib/hivewright/worker-0/enrolment.json {text}",
        '/var/lib/hivewright/worker-1/enrolment.json {"peer_id": "Qm1"}',
        '/var/lib/hivewright/worker-0.bak/enrolment.json {"peer_id": "Qm0"}',
        '/var/lib/hivewright/worker-1 (copy)/enrolment.json {"peer_id": "Qm1"}',
    ]
    assert Identities().process(lines) == {1: "Qm1"}
    assert DamagedEnrolments().process(lines) == ["/var/lib/hivewright/worker-0/enrolment.json"]


def test_slots_whose_model_the_machine_chose() -> None:
    folders = ("worker-10", "worker-2", "worker-2.bak")
    lines = [f"/var/lib/hivewright/{folder}/model.json" for folder in folders]
    assert ChosenModels().process(lines) == [2, 10]
    assert ChosenModels().process([]) == []


def test_service_state() -> None:
    lines = ["ActiveState=active", "UnitFileState=enabled", "NeedDaemonReload=no", "Digest=abc"]
    assert Service().process(lines) == ServiceState(is_active=True, is_enabled=True, digest="abc")
    unknown = ["ActiveState=inactive", "UnitFileState=", "NeedDaemonReload=no", "Digest="]
    assert Service().process(unknown) == ServiceState()


def test_node_reports_with_and_without_a_status() -> None:
    lines = [
        "unit=hivewright-worker@0.service",
        "NRestarts=2",
        "ExecMainStatus=0",
        "ActiveState=active",
        "ActiveEnterTimestamp=Mon 2026-11-23 14:25:21 UTC",
        "started_at=1795443921",
        "finished=1795443930.5:0.25 1795443940.25:NaN",
        WHAT,
        f"status={json.dumps(STATUS)}",
        "unit=hivewright-worker@1.service",
        "ActiveState=failed",
        "ExecMainStatus=4",
        "words=Traceback (most recent call last):",
        "words=RuntimeError: boom",
        "words=Exiting.",
        "Result=oom-kill",
        "finished=",
        "end",
    ]
    first, second = NodeReports().process(lines)
    assert first == {
        "unit": "hivewright-worker@0.service",
        "active_state": "active",
        "status": STATUS,
        "started_at": 1795443921.0,
        "restarts": 2,
        "exit_status": 0,
        "finished": (1795443930.5, 1795443940.25),
        "rewards": (0.25, None),
        "last_words": None,
        "problem": None,
        "result": None,
    }
    assert second["result"] == "oom-kill"
    assert (second["active_state"], second["status"], second["exit_status"]) == ("failed", None, 4)
    assert second["last_words"] == "RuntimeError: boom"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["Traceback (most recent call last):", '  File "x.py", line 1', "RuntimeError: boom"],
            "RuntimeError: boom",
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory", "terminating"],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (
            ["hivewright worker: ModelError (exit 5): no such model"],
            "hivewright worker: ModelError (exit 5): no such model",
        ),
        (
            ["Fatal Python error: Segmentation fault", "<no Python frame>"],
            "Fatal Python error: Segmentation fault",
        ),
        (["KeyboardInterrupt"], "KeyboardInterrupt"),
        (["so far so good", "Killed", ""], "Killed"),
        (["x" * 1000], "x" * 300),
        ([], None),
    ],
)
def test_of_a_log_the_words_about_an_end_are_found(lines: list[str], words: str | None) -> None:
    assert last_words(lines) == words


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON: Expecting value"),
        ('{"peer_id": "Q', "no JSON: Unterminated string"),
        ("{}", "state: Field required"),
        ("[]", "all of it: Input should be a valid dictionary"),
        ("[" * 100_000, "nested too deep"),
        (json.dumps(STATUS | {"ledger": None}), "ledger: Input should be a valid dictionary"),
        (
            json.dumps(STATUS | {"updated_at": float("nan")}),
            "updated_at: Input should be a finite number",
        ),
        (
            json.dumps(STATUS | {"swarm": {"peers_known": "many"}}),
            "swarm.peers_known: Input should be a valid integer",
        ),
    ],
)
@pytest.mark.usefixtures("usual_recursion_limit")
def test_status_that_is_none_is_said_of_its_worker_alone(text: str, reason: str) -> None:
    lines = [
        "sudo: a word before it all",
        "unit=hivewright-worker@0.service",
        "ActiveState=active",
        WHAT,
    ]
    lines += [f"status={text}", "finished=. 1.2.3 17.5"]
    lines += ["unit=hivewright-worker@1.service", WHAT, f"status={json.dumps(STATUS)}", "end"]
    damaged, whole = NodeReports().process(lines) or []
    assert (damaged["status"], damaged["finished"]) == (None, (17.5,))
    assert damaged["problem"].startswith(f"status.json can't be read: {reason}")
    assert (whole["status"], whole["problem"]) == (STATUS, None)


def answer_of(fact: NodeReports | HostStates, root: Path, path: str = "") -> Any:
    """Return a fact for a machine whose folders are below `root`, with `path` first in PATH."""
    command = re.sub(
        f"({STATE}|{CONFIGURATION})", lambda found: f"{root}{found[1]}", fact.command()
    )
    done = subprocess.run(
        ["sh", "-c", f"PATH={path}:$PATH; {command}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return fact.process(done.stdout.splitlines())


def test_status_with_line_breaks_and_backslashes_arrives_as_it_is(tmp_path: Path) -> None:
    for folder in (CONFIGURATION, STATE / "worker-0"):
        (tmp_path / folder.relative_to("/")).mkdir(parents=True)
    (tmp_path / CONFIGURATION.relative_to("/") / "worker-0.yaml").touch()
    status = STATUS | {"last_error": 'first\nsecond \\ "third"'}
    (tmp_path / STATE.relative_to("/") / "worker-0/status.json").write_text(
        json.dumps(status, indent=2)
    )
    rounds = tmp_path / STATE.relative_to("/") / "worker-0/rounds.jsonl"
    rounds.write_text(
        '{"round": 1, "finished_at": 17.5, "reward_mean": 0.25, "loss": 0.1, "skipped":'
        ' null}\n{"round": 2, "finished_at": 18.5, "reward_mean": 0.5, "loss": 0.1, "skipped":'
        ' "non-finite"}\n{"round": 3, "finished_at": 19.5, "loss": 0.1}\n{"round": 4, "finished'
    )
    (report,) = answer_of(NodeReports(), tmp_path)
    assert (report["status"], report["problem"]) == (status, None)
    assert (report["finished"], report["rewards"]) == ((17.5, 19.5), (0.25, None))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def huge_file(path: Path) -> None:
    with path.open("w") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (link, "is a symbolic link; expected a file of the service's own: stop the service"),
        (dangling_link, "is a symbolic link;"),
        (fifo, "is a fifo;"),
        (Path.mkdir, "is a directory;"),
        (huge_file, f"has {1 << 40} bytes; expected 1048576 at most: stop the service"),
    ],
)
def test_status_and_rounds_that_are_no_files_of_a_usual_size_are_not_read(
    make: Callable[[Path], None], problem: str, tmp_path: Path
) -> None:
    for folder in (CONFIGURATION, STATE / "worker-0"):
        (tmp_path / folder.relative_to("/")).mkdir(parents=True)
    (tmp_path / CONFIGURATION.relative_to("/") / "worker-0.yaml").touch()
    slot = tmp_path / STATE.relative_to("/") / "worker-0"
    for name in ("status.json", "rounds.jsonl"):
        make(slot / name)
    began = time.monotonic()
    (report,) = answer_of(NodeReports(), tmp_path)
    assert time.monotonic() - began < 30
    assert (report["status"], report["finished"]) == (None, ())
    assert report["problem"].startswith(f"status.json {problem}")


def test_status_with_other_bytes_than_json_has_spoils_no_answer(tmp_path: Path) -> None:
    for folder in (CONFIGURATION, STATE / "worker-0"):
        (tmp_path / folder.relative_to("/")).mkdir(parents=True)
    (tmp_path / CONFIGURATION.relative_to("/") / "worker-0.yaml").touch()
    file = tmp_path / STATE.relative_to("/") / "worker-0/status.json"
    file.write_bytes(b"\xff\0\rend\nend\n\x1b[2J")
    (report,) = answer_of(NodeReports(), tmp_path)
    assert report["problem"].startswith("status.json can't be read: no JSON")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo Failed to initialize NVML: Driver/library version mismatch; exit 18",
            "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch",
        ),
        ("echo No devices were found; exit 6", "nvidia-smi: No devices were found"),
        ("exit 9", "nvidia-smi: ended with code 9"),
        ("sleep 60", "nvidia-smi: no answer within 1 s"),
        ("echo '0, GPU-aa, 1024, 81559, 37'", None),
    ],
)
def test_nvidia_smi_that_complains_or_hangs_costs_nothing_else_of_the_host(
    script: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploys.fleet_facts.WITHIN", "timeout --kill-after=2 1")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    began = time.monotonic()
    found = answer_of(HostStates(), tmp_path, str(tmp_path))
    assert time.monotonic() - began < 30
    assert found["problem"] == problem
    assert found["disk_total_mb"] > 0
    assert len(found["gpus"]) == (problem is None)


@pytest.mark.parametrize(
    "line", ["process=[N/A], [N/A]", "process=No running processes found", "process="]
)
def test_process_that_nvidia_smi_does_not_know_is_none(line: str) -> None:
    found = HostStates().process(["gpu=0, GPU-aa, 1024, 81559, 37", "nvidia-smi=0", line, "end"])
    assert found is not None
    assert (found["gpus"][0]["pids"], found["problem"]) == ((), None)


@pytest.mark.parametrize(
    ("answer", "state"),
    [("", "no answer"), ("failed to connect", "unreadable"), ("{}", "unreadable")],
)
def test_tailscale_without_a_state_is_not_taken_for_one(answer: str, state: str) -> None:
    found = HostStates().process([f"tailscale={answer}", "disk=- 17", "end"])
    assert found is not None
    assert (found["tailscale"], found["disk_free_mb"]) == (state, None)


def test_host_state_with_gpus_and_what_computes_on_them() -> None:
    lines = [
        "commit=abc",
        "deployed=123",
        "previous=",
        "disk= 12000 50000",
        'tailscale={"BackendState": "NeedsLogin"}',
        "tailscale-server=https://headscale.example.org",
        "gpu=0, GPU-aa, 1024, 81559, 37",
        "gpu=1, GPU-bb, [N/A], 81559, [N/A]",
        "process=GPU-aa, 4711",
        "end",
    ]
    found = HostStates().process(lines)
    assert (found["commit"], found["deployed"], found["previous"]) == ("abc", "123", None)
    assert (found["disk_free_mb"], found["disk_total_mb"], found["tailscale"]) == (
        12000,
        50000,
        "NeedsLogin",
    )
    assert found["tailscale_server"] == "https://headscale.example.org"
    assert found["gpus"][0] == {
        "index": 0,
        "memory_used": 1024,
        "memory_total": 81559,
        "use": 37,
        "pids": (4711,),
    }
    assert found["gpus"][1]["use"] is None


def test_memory_clock_and_key_of_a_host() -> None:
    expiry = '{"BackendState": "Running", "Self": {"KeyExpiry": "2027-01-01T00:00:00Z"}}'
    lines = [
        *(f"meminfo={line}" for line in recording("meminfo.txt").splitlines()),
        *(f"pressure={line}" for line in recording("pressure-memory.txt").splitlines()),
        f"tailscale={expiry}",
        f"clock={int(time.time()) + 3600}",
        "end",
    ]
    found = HostStates().process(lines)
    assert found["clock_offset"] == pytest.approx(3600, abs=5)
    assert found["key_expires_at"] == 1798761600
    (line,) = found["ill"]
    assert line.startswith("pressure: programs waited for memory in 59% of the last minute; ")
    bare = HostStates().process(["clock=", "end"])
    assert (bare["clock_offset"], bare["key_expires_at"], bare["ill"]) == (None, None, ())


def test_this_machine_tells_its_clock_and_its_memory(tmp_path: Path) -> None:
    found = answer_of(HostStates(), tmp_path)
    assert abs(found["clock_offset"]) < 10


@pytest.mark.parametrize(
    "fact", [FileContent(), SystemdVersion(), UserEntry(), PastDeploys(), TailnetOfHost()]
)
def test_answer_that_makes_no_sense_is_the_host_s_error(fact: OwnFact[Any]) -> None:
    with pytest.raises(FactProcessError, match=f"{type(fact).__name__}: got 'last of us'"):
        fact.process(["last of us"])


def test_answer_that_makes_no_sense_ends_no_other_host_s_run(tmp_path: Path) -> None:
    odd = {"fake_responses": {TailnetOfHost().command(): '{"status": {"Backend'}, "fake_delay": 0.0}
    (tmp_path / "fleet.py").write_text(
        f"workers = [('@fake/odd', {odd!r}), ('@fake/well', {{'fake_delay': 0.0}})]\n"
    )
    (tmp_path / "deploy.py").write_text(
        "from pyinfra import host\nfrom pyinfra.operations import server\nfrom"
        " deploys.tailscale.join import TailnetOfHost\nserver.shell(name='Go on', commands=[f'echo"
        " {host.get_fact(TailnetOfHost).is_installed}'])\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyinfra",
            "-y",
            "--json",
            str(tmp_path / "fleet.py"),
            str(tmp_path / "deploy.py"),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (operation,) = json.loads(done.stdout)["results"]["operations"]
    assert (done.returncode, operation["success"]) == (1, ["@fake/well"]), done.stderr
    assert "FactProcessError: TailnetOfHost: got" in done.stderr


def test_host_that_did_not_answer_to_the_end_is_not_taken_for_a_bare_one() -> None:
    for fact in (NodeReports(), HostStates(), Logs(), Footprint()):
        assert fact.default() is None
        assert fact.process(["unit=hivewright-worker@0.service"]) is None
    assert NodeReports().process(["end"]) == []
    assert Footprint().process(["end"]) == []


def test_user_and_packages_as_the_system_has_them() -> None:
    line = "hivewright:x:998:998::/var/lib/hivewright:/usr/sbin/nologin"
    assert UserEntry().process([line]) == ("/var/lib/hivewright", "/usr/sbin/nologin")
    assert InstalledPackages().process(["ii  git", "rc  nano", "un  screen", "hi  gcc"]) == {
        "git",
        "gcc",
    }


def test_last_and_previous_deploy() -> None:
    assert PastDeploys().process(["last", "previous"]) == Deploys()
    assert PastDeploys().process(["last 12ab", "previous 34cd"]) == Deploys("12ab", "34cd")


def test_systemd_version() -> None:
    assert SystemdVersion().process(["systemd 252 (252.39-1~deb12u2)"]) == 252


def test_commands_are_quiet_and_succeed_on_a_machine_without_any_of_it(tmp_path: Path) -> None:
    for command in (
        Releases().command(),
        Identities().command(),
        ChosenModels().command(),
        ConfiguredSlots().command(),
        Service().command(unit="hivewright-no-such@0.service"),
        NodeReports().command(),
        HostStates().command(),
        Logs().command(lines=3, unit="hivewright-no-such.service"),
        Footprint().command(),
        PastDeploys().command(),
        UserEntry().command(user="nosuchuser"),
        InstalledPackages().command(names=["no-such-package"]),
        SystemdVersion().command(),
    ):
        done = subprocess.run(
            ["sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            cwd=tmp_path,
        )
        assert (done.returncode, done.stderr) == (0, ""), command

"""The demo's child processes: what is reported when one fails, and that none is left behind."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from worker.commands import demo_processes
from worker.commands.demo import Demo
from worker.commands.demo_processes import Child, Children
from worker.errors import DemoFailed

# Called as Python is: "-m worker COMMAND --settings FILE"; the settings file is a shell script.
INTERPRETER = '#!/bin/sh\nexec /bin/sh "$5" "$3"\n'


@pytest.fixture(autouse=True)
def _shell_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    monkeypatch.setattr(demo_processes.sys, "executable", str(interpreter))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Child]:
    """Start a child that runs a shell script; `children` ends it."""

    def start(script: str, children: Children, name: str = "keeper", ends: bool = False) -> Child:
        file = tmp_path / f"{name}.yaml"
        file.write_text(script)
        return children.start("keeper", file, name, ends)

    return start


@pytest.fixture
def children(tmp_path: Path) -> Children:
    return Children(tmp_path / "logs")


Run = Callable[..., Child]


def test_command_and_output_of_a_child(run: Run, children: Children, tmp_path: Path) -> None:
    with children:
        run("echo $1; echo wrong >&2", children, ends=True).wait(20)
        children.require_healthy()
    assert (tmp_path / "logs/keeper.log").read_text() == "keeper\nwrong\n"


def test_child_that_fails_is_reported_with_its_last_line(run: Run, children: Children) -> None:
    with children:
        child = run("echo first; echo no such port; exit 3", children, ends=True)
        with pytest.raises(DemoFailed, match=r"keeper ended with 3: no such port \(.*keeper\.log"):
            child.wait(20)
        with pytest.raises(DemoFailed, match="keeper ended with 3"):
            children.require_healthy()


def test_service_that_ends_is_a_failure_though_its_code_is_0(run: Run, children: Children) -> None:
    with children:
        child = run("exit 0", children)
        child.process.wait(20)
        with pytest.raises(DemoFailed, match="keeper ended with 0: no output"):
            children.require_healthy()


def test_command_that_takes_too_long_is_named_with_its_log(run: Run, children: Children) -> None:
    with children:
        child = run("sleep 60", children, ends=True)
        with pytest.raises(DemoFailed, match="keeper: not done after 0 s; its log is"):
            child.wait(0.05)
        assert child.is_running
    assert not child.is_running


def test_file_of_a_child_that_is_ready(run: Run, children: Children, tmp_path: Path) -> None:
    address = tmp_path / "address"
    with children:
        child = run(f"sleep 0.2; echo ' http://here ' > {address}; sleep 60", children)
        assert child.wait_for_file(address, 20) == "http://here"


def test_child_that_ends_before_it_is_ready(run: Run, children: Children, tmp_path: Path) -> None:
    with children:
        child = run("echo port in use; exit 4", children)
        with pytest.raises(DemoFailed, match="keeper ended with 4: port in use"):
            child.wait_for_file(tmp_path / "address", 20)


def test_child_that_is_never_ready(run: Run, children: Children, tmp_path: Path) -> None:
    with children:
        child = run("sleep 60", children)
        with pytest.raises(DemoFailed, match=r"keeper: not ready after 0 s, no .*address"):
            child.wait_for_file(tmp_path / "address", 0.1)


def test_child_that_was_killed_is_named_with_the_signal(run: Run, children: Children) -> None:
    with children:
        child = run("kill -9 $$", children)
        child.process.wait(20)
        with pytest.raises(DemoFailed, match="keeper was killed by SIGKILL, not by the demo"):
            children.require_healthy()


def test_demo_ends_when_one_of_its_workers_was_killed(
    run: Run, children: Children, tmp_path: Path
) -> None:
    demo = Demo(tmp_path / "demo", 2, 10, 1, Console(quiet=True))
    with children:
        run("kill -9 $$", children, name="worker-0", ends=True)
        run("sleep 60", children, name="worker-1", ends=True)
        with pytest.raises(DemoFailed, match="worker-0 was killed by SIGKILL, not by the demo"):
            demo.watch(children)


def test_all_children_are_asked_to_stop_at_the_end(
    run: Run, children: Children, tmp_path: Path
) -> None:
    log, ready = tmp_path / "order", [tmp_path / name for name in ("a", "b")]
    with children:
        for file in ready:
            script = f"trap 'echo {file.name} >> {log}; exit 0' TERM; touch {file};"
            child = run(f"{script} while :; do sleep 0.05; done", children, name=file.name)
            child.wait_for_file(file, 20)
    assert sorted(log.read_text().split()) == ["a", "b"]
    assert [child.process.returncode for child in children.by_name.values()] == [0, 0]


def test_child_that_does_not_stop_is_killed(
    run: Run, children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_processes, "STOP_SECONDS", 0.1)
    ready = tmp_path / "ready"
    began = time.monotonic()
    with children:
        child = run(f"trap '' TERM; touch {ready}; while :; do sleep 0.05; done", children)
        child.wait_for_file(ready, 20)
    assert child.process.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 20


def test_interrupt_of_the_demo_does_not_reach_its_children(run: Run, children: Children) -> None:
    with children:
        child = run("sleep 60", children)
        assert os.getsid(child.process.pid) == child.process.pid

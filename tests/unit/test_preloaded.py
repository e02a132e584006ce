"""Forked test processes behave as ones that subprocess starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import preloaded

MODULE = "json"


def run(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return preloaded.run(command, MODULE, timeout=60, **options)  # type: ignore[arg-type]


def test_process_has_its_arguments_folder_and_environment_and_is_our_child(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), dict(os.environ), os.getppid())"
    done = run(code, "a", cwd=tmp_path, env={"KEY": "value"})
    assert done.stdout == f"['a'] {tmp_path} {{'KEY': 'value'}} {os.getpid()}\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("code", "returncode", "stderr"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('wrong')", 1, "wrong\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_process_ends_with_its_own_code(code: str, returncode: int, stderr: str) -> None:
    done = run(code)
    assert (done.returncode, done.stderr) == (returncode, stderr)


def test_error_has_code_1_and_a_traceback() -> None:
    done = run("raise ValueError('this one')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: this one\n")


def test_process_that_takes_too_long_is_killed() -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        preloaded.run([sys.executable, "-c", code], MODULE, timeout=3)
    assert caught.value.stdout is not None
    assert not Path(f"/proc/{int(caught.value.stdout)}").exists()


def test_module_runs_as_main() -> None:
    done = preloaded.run([sys.executable, "-m", "calendar", "2026", "1"], MODULE, timeout=60)
    assert "January 2026" in done.stdout

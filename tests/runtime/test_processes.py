"""Children end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = """
import os, signal, sys, time
from worker.runtime.processes import die_with_parent
print(die_with_parent(int(sys.argv[1]), signal.SIGTERM), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-c", sys.argv[1], str(os.getpid())]
child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_child_of_a_killed_parent_ends():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        pid, is_child = parent.stdout.readline().split()
        assert is_child == "True"
        assert not has_ended(int(pid))
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not has_ended(int(pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert has_ended(int(pid))


def test_parent_that_ended_before_is_noticed():
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, "1"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "False\n"
        child.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_role_in_order_with_code_0(signum):
    code = (
        "import time; from worker.runtime.processes import exit_on_signals; exit_on_signals()\n"
        "try:\n    print('ready', flush=True); time.sleep(60)\nfinally:\n    print('closed')"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as role:
        assert role.stdout.readline() == "ready\n"
        os.kill(role.pid, signum)
        assert role.stdout.read() == "closed\n"
        assert role.wait(20) == 0

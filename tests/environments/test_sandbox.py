"""The sandbox for programs of untrusted peers."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from worker.environments import sandbox
from worker.environments.sandbox import Runner, require_isolation
from worker.errors import ResourceError


@pytest.fixture
def runner():
    with Runner() as runner:
        yield runner


def test_program_is_run_for_each_input(runner):
    program = (
        "import math\nfrom collections import Counter\ndef f(x, y):\n    return [x + y,"
        " math.gcd(x, y)]"
    )
    assert runner.run(program, "f", [[4, 6], [1, 2]]) == ["[10, 2]", "[3, 1]"]
    assert runner.run("def f(x): return x['a']", "f", [[{"a": True}], [{}]]) == ["true", None]


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): return 1 / 0",
        "def f(x): return {1, 2}",
        "def g(x): return 1",
        "f = 3",
        "def f(): return 1",
        "def f(x): return f(x)",
        "def f(x): raise SystemExit",
        "def f(x):\n    import numpy",
        "def f(x): return input()",
    ],
)
def test_program_that_fails_gives_no_result(runner, program):
    assert runner.run(program, "f", [[1]]) in ([None], None)


@pytest.mark.parametrize(
    "program",
    [
        "def f(x:",
        "1 / 0",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "raise BaseException",
        "\x00",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_program_that_does_not_start_gives_nothing(runner, program):
    assert runner.run(program, "f", [[1]]) is None
    assert runner.run("def f(x): return x", "f", [[1]]) == ["1"]


def test_endless_loop_costs_a_second_of_processor_time(runner):
    started = time.monotonic()
    for program in (
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "import os\nwhile True: os.sched_yield()",
    ):
        assert runner.run(program, "f", [[1]]) is None
    assert time.monotonic() - started < 12


def test_program_can_not_wait(runner):
    """No permitted system call blocks, so a program's processor time bounds its duration."""
    program = (
        "import time, _thread\ndef f(x):\n    try:\n        time.sleep(60)\n    except OSError:\n  "
        "      return 'awake'"
    )
    assert runner.run(program, "f", [[1]]) == ['"awake"']
    lock = "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"
    started = time.monotonic()
    assert runner.run(lock, "f", [[1]]) is None
    assert time.monotonic() - started < 5


def test_memory_hog_gets_no_more_than_its_share(runner):
    assert runner.run("def f(x): return len(bytearray(100 << 20))", "f", [[1]]) == [str(100 << 20)]
    assert runner.run("def f(x): return len(bytearray(400 << 20))", "f", [[1]]) == [None]
    hog = "def f(x):\n    kept = []\n    while True:\n        kept.append(bytearray(1 << 20))"
    assert runner.run(hog, "f", [[1]]) in ([None], None)


def test_fork_bomb_makes_no_process(runner):
    bomb = (
        "import os, ctypes, _thread\nlibc = ctypes.CDLL(None)\ndef f(x):\n    made = 0\n    for"
        " call in (os.fork, libc.fork, libc.vfork, lambda: _thread.start_new_thread(f, (x,))):\n   "
        "     try:\n            made += call() != -1\n        except (OSError, RuntimeError):\n    "
        "        pass\n    return made"
    )
    before = children_of(runner._process.pid)
    assert runner.run(bomb, "f", [[1]]) == ["0"]
    assert children_of(runner._process.pid) == before == []


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_files_can_be_neither_read_nor_written(runner, tmp_path):
    """The state folder with the node's key, say."""
    (tmp_path / "swarm.pem").write_text("the key")
    program = (
        "import os, io, ctypes\nlibc = ctypes.CDLL(None)\ndef f(folder):\n    got = []\n    for"
        " attempt in (\n        lambda: open(folder + '/swarm.pem').read(),\n        lambda:"
        " os.open(folder + '/swarm.pem', os.O_RDONLY),\n        lambda: io.FileIO(folder + '/new',"
        " 'w'),\n        lambda: os.listdir(folder),\n        lambda: os.stat(folder),\n       "
        " lambda: os.mkdir(folder + '/new'),\n        lambda: os.unlink(folder + '/swarm.pem'),\n  "
        "      lambda: os.chdir(folder),\n        lambda: os.memfd_create('x'),\n        lambda:"
        " os.environ.get('HOME', 1 / 0),\n        lambda: open('/proc/self/environ').read(),\n     "
        "   lambda: 1 / (libc.open(folder.encode() + b'/swarm.pem', 0) + 1),\n        lambda: 1 /"
        " (libc.syscall(437, -100, folder.encode() + b'/swarm.pem', b'\\0' * 24, 24) + 1),\n   "
        " ):\n        try:\n            got.append(repr(attempt()))\n        except Exception:\n   "
        "         pass\n    return got"
    )
    assert runner.run(program, "f", [[str(tmp_path)]]) == ["[]"]
    assert {path.name for path in tmp_path.iterdir()} == {"swarm.pem"}
    assert (tmp_path / "swarm.pem").read_text() == "the key"


def test_network_can_not_be_reached(runner):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(port):\n    return [libc.socket(domain,"
            " kind, 0) for domain in (1, 2, 10, 16, 17) for kind in (1, 2, 3)]"
        )
        outputs = runner.run(program, "f", [[port]])
        assert outputs is not None
        assert set(json.loads(outputs[0])) == {-1}


def test_parent_can_be_neither_killed_nor_traced(runner):
    program = (
        "import os, ctypes, signal\nlibc = ctypes.CDLL(None)\ndef f(parent, runner):\n    for pid"
        " in (parent, runner, -1, 0):\n        for call in (lambda: os.kill(pid, 9), lambda:"
        " libc.kill(pid, 9),\n                     lambda: libc.syscall(234, pid, pid, 9), lambda:"
        " libc.ptrace(16, pid, 0, 0),\n                     lambda: libc.syscall(311, pid, 0, 0, 0,"
        " 0, 0)):\n            try:\n                if call() not in (-1, None): return 'done'\n  "
        "          except OSError:\n                pass\n    return 'alive'"
    )
    runner_pid = runner._process.pid
    assert runner.run(program, "f", [[os.getpid(), runner_pid]]) == ['"alive"']
    assert runner.run("def f(x): return x", "f", [[1]]) == ["1"]
    assert runner._process.pid == runner_pid


def test_limits_and_filter_can_not_be_lifted(runner):
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n    limit = (ctypes.c_ulong * 2)(1 <<"
        " 40, 1 << 40)\n    return [libc.setrlimit(9, limit), libc.prctl(22, 0, 0, 0, 0),"
        " libc.unshare(0x10000000)]"
    )
    assert runner.run(program, "f", [[1]]) == ["[-1, -1, -1]"]


def test_result_can_not_be_faked(runner):
    """Only output with the right number and form of results is accepted."""
    for text in (
        "[1, 2]",
        '["1"]',
        "{}",
        "[" * 50_000,
        "9" * 10_000,
        '["1", "2", "3"]',
        "null",
        "sealed",
        '{"sealed": 1}',
    ):
        program = (
            f"import os\nfor fd in range(20):\n    try: os.write(fd, {text!r}.encode() + b'\\n')\n"
            "    except OSError: pass\nos._exit(0)"
        )
        assert runner.run(program, "f", [[1], [2]]) is None
    stdout = (
        "import sys\nprint('[\"1\", \"2\"]', flush=True)\nsys.__stdout__.write('x')\ndef f(x):"
        " return x"
    )
    assert runner.run(stdout, "f", [[1], [2]]) == ["1", "2"]


def test_huge_output_is_cut_off(runner):
    for program in (
        "def f(x): return 'x' * 10_000_000",
        "import os\nwhile True: os.write(3, b'x' * 65536)",
    ):
        started = time.monotonic()
        assert runner.run(program, "f", [[1]]) is None
        assert time.monotonic() - started < 5
    assert runner.run("print('x' * 10_000_000)\ndef f(x): return x", "f", [[1]]) == ["1"]


def test_programs_know_nothing_of_each_other(runner):
    first = "import builtins, math\nbuiltins.stolen = 'secret'\nmath.pi = 3\ndef f(x): return x"
    assert runner.run(first, "f", [[1]]) == ["1"]
    second = "import builtins, math\ndef f(x): return [hasattr(builtins, 'stolen'), math.pi == 3]"
    assert runner.run(second, "f", [[1]]) == ["[false, false]"]


def test_runner_that_was_killed_is_started_again(runner):
    runner._process.kill()
    runner._process.wait()
    assert runner.run("def f(x): return x", "f", [[7]]) == ["7"]


def test_many_threads_have_runners_of_their_own():
    results = []

    def work(number: int) -> None:
        with Runner() as runner:
            results.append(runner.run("def f(x): return x", "f", [[number]]) == [str(number)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 6


def test_nothing_is_left_when_the_worker_is_killed():
    code = (
        "import os, threading, time\nfrom worker.environments.sandbox import Runner\nrunner ="
        " Runner().__enter__()\nthreading.Thread(target=runner.run, args=('while True: pass', 'f',"
        " [[1]]), daemon=True).start()\ntime.sleep(0.4)\nprint(runner._process.pid,"
        " flush=True)\ntime.sleep(30)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the runner lives on"
        time.sleep(0.05)


def test_isolation_is_had_here():
    require_isolation()


def test_machine_without_isolation_is_refused_in_one_line(tmp_path, monkeypatch):
    """If the filter can't be set, as in a kernel without seccomp, the program is not run."""
    inner = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    mark = tmp_path / "mark"
    for old, new, reason in (
        (
            "PR_SET_SECCOMP, SECCOMP_MODE_FILTER,",
            "PR_SET_SECCOMP, 77,",
            "prctl 22: Invalid argument",
        ),
        (
            "ARCHITECTURES.get(platform.machine())",
            "ARCHITECTURES.get('vax')",
            "no system call filter for linux on",
        ),
    ):
        assert old in inner
        (tmp_path / "sandbox_child.py").write_text(inner.replace(old, new))
        monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
        with pytest.raises(
            ResourceError, match=f"not available on this machine: .*{reason}"
        ) as caught:
            require_isolation()
        assert "\n" not in str(caught.value)
        with Runner() as runner, pytest.raises(ResourceError):
            runner.run(f"open({str(mark)!r}, 'w')", "f", [[1]])
    assert not mark.exists()


def test_filter_that_holds_nothing_is_found_out(tmp_path, monkeypatch):
    """A filter that permits everything is detected, though every call to set it succeeded."""
    inner = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    open_filter = inner.replace("SECCOMP_RET_ERRNO | EPERM)", "SECCOMP_RET_ALLOW)")
    assert open_filter != inner
    (tmp_path / "sandbox_child.py").write_text(open_filter)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(
        ResourceError,
        match=r"does not isolate on this machine: a program could .*connect to a network",
    ):
        require_isolation()

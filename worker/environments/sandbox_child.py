"""The inner side of the sandbox: a script run by `python -I -S`, without our other modules.

It reads jobs from standard input, one per line, runs each job's program in a sealed fork of itself,
and writes the result as one line. The fork, once sealed, can compute, use a limited amount of
memory, and write to one pipe. It can't open, create, fork, execute, connect, signal or trace
anything: seccomp refuses all those system calls, whatever the program does to the interpreter
around it. The expected results are never in this process.
"""

import bisect  # noqa: F401 - for the programs: a sealed process can import nothing that is not loaded
import collections
import copy  # noqa: F401
import ctypes
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import operator  # noqa: F401
import os
import platform
import random  # noqa: F401
import re  # noqa: F401
import resource
import select
import signal
import string  # noqa: F401
import struct
import sys
import time
import typing

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
EPERM = 1
RESULT_FD = 3

Arch = collections.namedtuple("Arch", "audit_arch syscalls")

# The system calls of a sealed program; all others fail with EPERM. None of them waits, so a program
# that does not end uses processor time, which is limited.
ARCHITECTURES = {
    "x86_64": Arch(
        0xC000003E,
        (
            *(0, 1, 3, 20),  # read, write, close, writev (of the four files that are open)
            *(9, 10, 11, 12, 25, 28),  # mmap, mprotect, munmap, brk, mremap, madvise
            *(13, 14, 15, 131),  # rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack
            *(39, 186),  # getpid, gettid
            *(228, 229, 96, 201),  # clock_gettime, clock_getres, gettimeofday, time
            *(318, 60, 231),  # getrandom, exit, exit_group
        ),
    ),
    "aarch64": Arch(
        0xC00000B7,
        (
            *(63, 64, 57, 66),  # in the same order; there is no time
            *(222, 226, 215, 214, 216, 233),
            *(134, 135, 139, 132),
            *(172, 178),
            *(113, 114, 169),
            *(278, 93, 94),
        ),
    ),
}


def filter_program(arch: Arch) -> bytes:
    """Return the seccomp filter in BPF: instructions of code, jump if true, if false, operand."""
    load, equal, answer = 0x20, 0x15, 0x06
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, arch.audit_arch),
        (answer, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (load, 0, 0, 0),
    ]
    for number in arch.syscalls:
        steps += [(equal, 0, 1, number), (answer, 0, 0, SECCOMP_RET_ALLOW)]
    steps.append((answer, 0, 0, SECCOMP_RET_ERRNO | EPERM))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


class Sealer:
    """Seals a process. It is created once, before any untrusted code; a fork calls `seal`."""

    def __init__(self) -> None:
        arch = ARCHITECTURES.get(platform.machine())
        if not sys.platform.startswith("linux") or arch is None:
            raise OSError(f"no system call filter for {sys.platform} on {platform.machine()}")
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        self._code = ctypes.create_string_buffer(filter_program(arch))
        # struct sock_fprog: number of instructions, then a pointer to them
        self._program = ctypes.create_string_buffer(
            struct.pack("HxxxxxxQ", (len(self._code) - 1) // 8, ctypes.addressof(self._code))
        )

    def seal(
        self,
        runner: int,
        cpu_seconds: int,
        memory_bytes: int,
    ) -> None:
        """Give up everything except computing and writing to open files. Raises OSError."""
        self._call(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != runner:
            raise OSError("the runner is gone")
        os.nice(10)
        limits = {
            resource.RLIMIT_CPU: cpu_seconds,
            resource.RLIMIT_AS: memory_bytes,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NOFILE: RESULT_FD + 1,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
        }
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
        self._call(PR_SET_DUMPABLE, 0)
        self._call(PR_SET_NO_NEW_PRIVS, 1)
        self._call(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(self._program))

    def _call(
        self,
        option: int,
        *values: int,
    ) -> None:
        arguments = (*values, 0, 0, 0, 0)[:4]
        padded = [ctypes.c_ulong(argument) for argument in arguments]
        if self._prctl(option, *padded) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def run_job(
    sealer: Sealer,
    job: dict[str, typing.Any],
) -> dict[str, typing.Any]:
    """Run one program.

    `outputs` in the reply: its output, unchecked; None: it wrote nothing in time, or too much, or
    could not start.
    """
    reading, writing = os.pipe()
    runner = os.getpid()
    child = os.fork()
    if child == 0:
        run_program(sealer, job, writing, runner)
    os.close(writing)
    try:
        return read_result(reading, time.monotonic() + job["wall_seconds"], job["output_bytes"])
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # it has no children: it can't fork
        os.waitpid(child, 0)


def read_result(
    reading: int,
    deadline: float,
    max_bytes: int,
) -> dict[str, typing.Any]:
    """Read the output of the fork.

    The fork writes "sealed" before the program starts; without that, the program has not run.
    """
    data = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            return {"sealed": data.startswith(b"sealed\n"), "outputs": None, "reason": "time"}
        chunk = os.read(reading, 65536)
        data += chunk
        if len(data) > max_bytes:
            return {"sealed": True, "outputs": None, "reason": "output"}
        if not chunk:
            head, _, body = data.partition(b"\n")
            text = body.decode(errors="replace")
            return {
                "sealed": head == b"sealed",
                "outputs": text or None,
                "reason": head.decode(errors="replace"),
            }


def run_program(
    sealer: Sealer,
    job: dict[str, typing.Any],
    writing: int,
    runner: int,
) -> typing.NoReturn:
    """Run the program in the fork. Never returns, whatever the program raises."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, the kernel kills this process first
    except OSError:
        pass
    keep_files(writing)
    try:
        sealer.seal(runner, job["cpu_seconds"], job["memory_bytes"])
    except (OSError, ValueError) as error:
        os.write(RESULT_FD, f"{error}\n".encode())
        os._exit(1)
    os.write(RESULT_FD, b"sealed\n")
    try:
        space: dict[str, typing.Any] = {"__name__": "answer"}
        exec(compile(job["program"], "answer", "exec"), space)  # noqa: S102 - this is what the sandbox is for
        outputs = [result_of(space, job["entry"], arguments) for arguments in job["inputs"]]
        data = json.dumps(outputs).encode()
        while data:
            data = data[os.write(RESULT_FD, data) :]
    finally:
        os._exit(0)


def keep_files(writing: int) -> None:
    """Close all files but `writing`, which becomes RESULT_FD; 0 to 2 become /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(RESULT_FD):
        os.dup2(null, number)
    os.dup2(writing, RESULT_FD)
    os.closerange(RESULT_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def result_of(
    space: dict[str, typing.Any],
    entry: str,
    arguments: list[typing.Any],
) -> str | None:
    """Return the result as JSON text; None: the program raised, or JSON can't represent it."""
    try:
        return json.dumps(space[entry](*arguments))
    except Exception:  # noqa: BLE001 - an untrusted program may raise anything
        return None


def main() -> None:
    try:
        sealer = Sealer()
    except OSError as error:
        print(json.dumps({"sealed": False, "outputs": None, "reason": str(error)}), flush=True)
        return
    for line in sys.stdin:
        print(json.dumps(run_job(sealer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""Foreign nodes on the same network: another implementation of the DHT, and wrong clocks."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarm_lab import Lab, make_groups, multiaddrs, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE_SECONDS = 60.0


class Program:
    """A process that says a line when it is ready, and one for each line that it is told."""

    def __init__(self, name: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / name), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={"PYTHONPATH": f"{ROOT}:{HERE}"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def hear(self) -> str:
        ready, _, _ = select.select([self._out], [], [], PATIENCE_SECONDS)
        return self._out.readline().strip() if ready else "nothing"

    def tell(self, line: str) -> str:
        self._in.write(line + "\n")
        self._in.flush()
        return self.hear()

    def end(self) -> None:
        self._in.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
        self._out.close()


@contextmanager
def running(name: str, *arguments: object) -> Iterator[Program]:
    program = Program(name, *arguments)
    try:
        yield program
    finally:
        program.end()


def test_node_of_another_implementation_stores_garbage_and_nobody_minds(
    lab: Lab, tmp_path: Path
) -> None:
    bootnode = lab.bootnode()
    lab.announce_every_seconds = 3.0
    first = lab.peer("first")
    with running("foreign.py", multiaddrs(bootnode)[0], tmp_path / "foreign") as foreign:
        assert foreign.hear().startswith("stored ")
        second = lab.peer("second")
        names = {s.status().peer_id for s in (first, second)}
        wait_until(
            lambda: all(names - {s.status().peer_id} <= set(s.peers()) for s in (first, second)),
            20,
            "they met",
        )
        for round in (1, 2, 3):
            for swarm in (first, second):
                swarm.publish(round, make_groups(swarm.status().peer_id, round))
            for swarm in (first, second):
                collected = swarm.collect(round, 9)
                assert {g.peer_id for g in collected.groups} == names - {swarm.status().peer_id}
                assert collected.rejected == {}
                assert swarm.status().state == "connected"
                assert swarm.status().daemon_restarts == 0
        assert len(first.peers()) <= 1 + 10  # ten genuine records of peers that are not there
        assert foreign.tell("") != "members 0"


def test_clocks_that_are_minutes_off_exchange(lab: Lab) -> None:
    bootnode = lab.bootnode()
    lab.announce_every_seconds = 20.0  # a record lives for one minute, the clocks differ by ten
    right = lab.peer("right")
    address = multiaddrs(bootnode)[0]
    folders = lab.folder("slow"), lab.folder("fast")
    with (
        running("clocked.py", -300, address, folders[0]) as slow,
        running("clocked.py", 300, address, folders[1]) as fast,
    ):
        names = [right.status().peer_id, slow.hear(), fast.hear()]
        wait_until(lambda: set(names[1:]) <= set(right.peers()), 20, "the right one knows both")
        right.publish(1, make_groups(names[0], 1))
        assert {g.peer_id for g in right.collect(1, 18).groups} == set(names[1:])
        assert slow.tell("2") == " ".join(sorted([names[0], names[2]]))
        assert fast.tell("2") == " ".join(sorted(names[:2]))

"""A thousand rounds of eight nodes, and each ten rounds a daemon is killed: nobody stops or hangs, memory is flat."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from swarm_lab import Lab, collect_all, make_groups, wait_until

from worker.swarm.exchange import Swarm

ROUNDS = 1000
WARM_UP = 100
"""Rounds before memory is first looked at."""

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


def resident_mb(pid: int | str) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_thousand_rounds_with_a_hundred_killed_daemons(lab: Lab) -> None:
    rng = random.Random(0)
    lab.bootnode()
    swarms = [lab.peer(f"n{i}") for i in range(8)]
    wait_until(lambda: all(s.status().peers_known == 7 for s in swarms), 60, "all know all")
    num_alone, longest, memory = 0, 0.0, {}
    for round in range(1, ROUNDS + 1):
        if round % 10 == 0:
            kill_daemon(rng.choice(swarms))
        for swarm in swarms:
            swarm.publish(round, make_groups(swarm.status().peer_id, round))
        started = time.monotonic()
        results = collect_all(swarms, round, want=12)
        longest = max(longest, time.monotonic() - started)
        num_alone += sum(not collected.groups for collected in results)
        assert all(collected.rejected == {} for collected in results)
        if round in (WARM_UP, ROUNDS):
            memory[round] = resident_mb("self")
    print(f"alone {num_alone} of {8 * ROUNDS}, longest round {longest:.1f} s, memory {memory}")
    wait_until(lambda: all(s.status().peers_known == 7 for s in swarms), 60, "all know all in the end")
    assert sum(s.status().daemon_restarts for s in swarms) >= ROUNDS // 10 - 8
    assert num_alone <= 2 * (ROUNDS // 10)  # whose daemon was killed in the middle of it
    assert longest < 20
    assert memory[ROUNDS] < memory[WARM_UP] + 30


def kill_daemon(swarm: Swarm) -> None:
    daemon = swarm._network._daemon
    if daemon is not None:
        os.kill(daemon.pid, signal.SIGKILL)

"""Queries of hosts: one that hangs, or is odd, does not cost the answers of the others."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploys.fleet import queries
from deploys.fleet.pyinfra_process import Pyinfra
from deploys.fleet.rollout_command import PyinfraFleet
from deploys.fleet_facts import HostStates, NodeReports
from worker.errors import SettingsError

ANSWERS = {HostStates().command(): "commit=abc\nend", NodeReports().command(): "end"}


def test_host_whose_driver_can_not_be_killed_is_given_up_and_the_others_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a process in an uninterruptible system call: its output stays open."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nsetsid sleep 60 &\nsleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(queries, "FACT_SECONDS", 2)
    inventory = tmp_path / "fleet.py"
    inventory.write_text(
        f"workers = [('@fake/a', {{'fake_responses': {ANSWERS!r}, 'fake_delay': 0.0}}), '@local']\n"
    )
    began = time.monotonic()
    found = queries.look(Pyinfra(str(inventory)), ["@fake/a", "@local"])
    assert time.monotonic() - began < 50
    assert found.states["@fake/a"]["commit"] == "abc"
    assert "@fake/a" in found.reports
    assert "@local" not in found.states


def standing_in(folder: Path, script: str) -> Pyinfra:
    """Return a pyinfra that runs `script`, in which $hosts are the hosts of `--limit`."""
    hosts = 'hosts=; while [ $# != 0 ]; do [ "$1" != --limit ] || hosts="$hosts $2"; shift; done; '
    return Pyinfra("inventory/x.py", prefix=("sh", "-c", hosts + script, "sh"))


@pytest.mark.parametrize("ill", ["sleep 60", "echo it broke >&2; exit 1"])
def test_hosts_are_asked_each_by_itself_when_one_spoils_the_answer_of_all(
    ill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "ASK_SECONDS", 1.0)
    answer = '{"a": {"HOST": {"commit": "abc"}}, "b": {"HOST": []}}'
    say = f"for host in $hosts; do echo '{answer}' | sed s/HOST/$host/g; done"
    pyinfra = standing_in(tmp_path, f"case $hosts in *gpu-2*) {ill};; esac; {say}")
    seen = PyinfraFleet(pyinfra, tmp_path, 60).look(["gpu-1", "gpu-2", "gpu-3"])
    assert sorted(seen) == ["gpu-1", "gpu-3"]
    reason = "no answer within 1 s" if ill.startswith("sleep") else "it broke"
    assert (tmp_path / "gpu-2.log").read_text() == f"asked what it is doing: {reason}\n"


@pytest.mark.parametrize("hosts", [["gpu-1"], ["gpu-1", "gpu-2"]])
def test_inventory_that_is_refused_is_nobodys_silence(hosts: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        queries.look(standing_in(tmp_path, "echo no such file >&2; exit 2"), hosts)

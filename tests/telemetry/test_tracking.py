"""Trackers get the figures of each round; one that fails is reported once and costs nothing.

The trackers themselves are real, if the packages of requirements/trackers.lock are installed.
"""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from worker.errors import SecretError, SettingsError
from worker.records import StepQuality
from worker.settings import Tracking
from worker.telemetry.status import FamilyReward, RoundRecord
from worker.telemetry.tracking import trackers
from worker.telemetry.tracking.figures import of_round
from worker.telemetry.tracking.run import Run
from worker.telemetry.tracking.trackers import Trackers, _Feed

ROOT = Path(__file__).resolve().parents[2]


def record(round, reward=0.5):
    return RoundRecord(
        round=round,
        finished_at=1e9,
        reward_mean=reward,
        loss=float("nan"),
        grad_norm=0.2,
        peers_heard=("QmA", "QmB"),
        groups_local=4,
        groups_external=2,
        groups_rejected={"seed": 2},
        groups_dropped={},
        tokens_per_second=1.0,
        seconds=2.0,
        skipped=None,
        quality=asdict(StepQuality(clip_ratio_low_mean=0.25, entropy=1.5)),
        seconds_by={"training": 1.5},
        families=(FamilyReward("gcd", 2, 4, 0.75, 0.1, 0.5),),
    )


class Memory:
    """A tracker that keeps what it gets, and fails at the rounds in `fails_at`."""

    def __init__(self, fails_at=()):
        self.rounds = []
        self.is_closed = False
        self.fails_at = fails_at

    def log(self, round, figures):
        if round in self.fails_at:
            raise RuntimeError(f"no room for {round}")
        self.rounds.append(round)

    def close(self):
        self.is_closed = True


def test_names_are_those_of_trl_and_values_are_finite():
    found = of_round(record(1))
    assert found["reward"] == 0.5
    assert found["clip_ratio/low_mean"] == 0.25
    assert found["entropy"] == 1.5
    assert found["swarm/peers_heard"] == 2
    assert found["swarm/rejected/seed"] == 2
    assert found["seconds/training"] == 1.5
    assert found["rewards/gcd/level_2/mean"] == 0.75
    assert "loss" not in found
    assert "sampling/kl" not in found


def test_tracker_that_fails_is_reported_once_and_its_neighbours_get_all(caplog):
    caplog.set_level("INFO", "worker.telemetry.tracking")
    broken, sound = Memory(fails_at=(2, 3)), Memory()
    both = Trackers([_Feed("broken", lambda: broken), _Feed("sound", lambda: sound)])
    for round in range(1, 6):
        both.log(record(round))
    both.close()
    assert sound.rounds == [1, 2, 3, 4, 5]
    assert broken.rounds == [1, 4, 5]
    assert broken.is_closed
    assert sound.is_closed
    lines = [line.getMessage() for line in caplog.records]
    assert lines == [
        "tracker fails, training continues without it name=broken error=RuntimeError:"
        " no room for 2",
        "tracker works again name=broken",
    ]


def test_tracker_that_hangs_delays_neither_rounds_nor_the_end(caplog):
    release = threading.Event()

    class Hanging(Memory):
        def log(self, round, figures):
            release.wait(20)

    feed = _Feed("hanging", Hanging)
    feed.waiting.maxsize = 3
    hanging = Trackers([feed])
    for round in range(10):
        hanging.log(record(round))
    hanging.close(seconds=0.1)
    release.set()
    assert "rounds are left out name=hanging" in caplog.text


def test_missing_package_and_key_are_named(tmp_path, monkeypatch):
    run = Run("Qm", "a", tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"tracking.trackio: the package trackio is not"):
        trackers.open_all(Tracking(trackio=True), run)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: object())
    key = tmp_path / "key"
    with pytest.raises(SecretError, match=r"tracking\.wandb_key_file"):
        trackers.open_all(Tracking(wandb="online", wandb_key_file=key), run)


# In a process of its own: these libraries keep global state and threads.
_LOG_ROUNDS = """
import json, sys
from pathlib import Path
from tests.telemetry.test_tracking import record
from worker.settings import Tracking
from worker.telemetry.tracking import trackers
from worker.telemetry.tracking.run import Run
tracking = Tracking(**json.loads(sys.argv[1]))
found = trackers.open_all(tracking, Run("QmRun", "gpu-1", Path(sys.argv[2]), {"node": {"seed": 0}}))
for round in range(int(sys.argv[3]), int(sys.argv[3]) + 3):
    found.log(record(round, round / 10))
found.close(60)
"""


def log_rounds(folder, first=1, **tracking):
    arguments = [json.dumps(tracking), str(folder), str(first)]
    done = subprocess.run(
        [sys.executable, "-c", _LOG_ROUNDS, *arguments],
        cwd=ROOT,
        env={**os.environ, "HOME": str(folder)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "tracker fails" not in done.stderr
    assert done.stdout == ""  # it would be among the lines of the log


def test_trackio_has_the_rounds_of_both_starts(tmp_path):
    pytest.importorskip("trackio")
    log_rounds(tmp_path, trackio=True)
    log_rounds(tmp_path, first=4, trackio=True)
    database = tmp_path / "trackio/hivewright.db"
    rows = sqlite3.connect(database).execute("select step, metrics from metrics order by step")
    found = {step: json.loads(metrics)["reward"] for step, metrics in rows}
    assert found == {n: n / 10 for n in range(1, 7)}


def test_wandb_writes_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    log_rounds(tmp_path, wandb="offline")
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 1000


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    log_rounds(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard/hivewright/gpu-1").glob("events.*")
    assert b"rewards/gcd/level_2/mean" in events.read_bytes()

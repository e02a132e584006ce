"""A fleet of one node with real figures, and of a process that does not answer."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from worker import metrics_endpoint, settings
from worker.telemetry.status import FamilyReward, Finding, NodeStatus, RoundRecord

HOSTILE = "<b>evil</b>\x1b"


def status_of(folder: Path, name: str, round: int) -> NodeStatus:
    record = RoundRecord(round, 1e9, 0.5, 0, 0, (), 4, 2, {}, {}, 1, 1, None, external_share=0.25)
    families = (FamilyReward("gcd", 1, 4, 0.5, 0.1, 0.0),)
    record = replace(record, families=families)
    node = NodeStatus(name, "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", round=round)
    node.state, node.reward_mean, node.last_round = "connected", 0.5, record
    node.warnings = (Finding("clock", "severe", "7 s"),)
    node.market_brier = {"bf": 0.25}
    node.write(folder)
    return node


@pytest.fixture
def targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    """Serve a node's figures, and name it and a process that does not answer in a file."""
    caplog.set_level("INFO", "worker.metrics_endpoint")
    folder = tmp_path / "worker-0"
    folder.mkdir()
    node = status_of(folder, "gpu-1", 12)
    assert node.last_round is not None
    of = settings.from_flat({"node_state_dir": str(folder), "metrics_port": 0}, "test")
    with ExitStack() as stack:
        stack.enter_context(metrics_endpoint.serving("worker", of))
        address = re.findall(r"http://([0-9.:]+)", caplog.text)[-1]
        groups = [
            {"targets": [address], "labels": {"host": HOSTILE, "service": "worker", "slot": "0"}},
            {"targets": ["127.0.0.1:1"], "labels": {"host": "hub", "service": "keeper"}},
        ]
        file = tmp_path / "targets.json"
        file.write_text(json.dumps(groups))
        yield file

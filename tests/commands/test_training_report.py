"""The report of a run: one file, everything in it, nothing from outside, no script."""

import argparse
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from worker import settings
from worker.commands import training_report
from worker.errors import SettingsError
from worker.records import StepQuality
from worker.telemetry.answer_log import Answer, AnsweredGroup, AnswerLog
from worker.telemetry.evaluation_log import Evaluation, append
from worker.telemetry.status import FamilyReward, NodeStatus, RoundRecord

EVIL = "<script>alert(1)</script>\x1b[31m"


def node_with_history(folder, num_rounds=30):
    for n in range(num_rounds):
        RoundRecord(
            round=n,
            finished_at=1e9 + n,
            reward_mean=n / num_rounds,
            loss=0.1,
            grad_norm=0.2,
            peers_heard=("QmA",),
            groups_local=4,
            groups_external=2,
            groups_rejected={},
            groups_dropped={},
            tokens_per_second=1.0,
            seconds=2.0,
            skipped=None,
            quality=asdict(StepQuality(entropy=1.5)),
            families=(FamilyReward("gcd", 0, 2, n / num_rounds, 0, 0.5),),
        ).append(folder)
    NodeStatus("gpu-1", "QmMe", "quick brown otter", "hivewright/tiny", "0.1.0").write(folder)
    append(folder, Evaluation(None, 0, 1e9, 1, 0.1, ()))
    append(folder, Evaluation(29, 30, 1e9, 1, 0.6, ()))
    answers = (Answer(f"right {EVIL}", 1.0), Answer("wrong", 0.0))
    group = AnsweredGroup(29, "gcd", 0, "system", None, True, "What is 2+2?", "4", answers)
    AnswerLog(folder, 10, 10).write(29, [group])


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [
            value for name, value in attributes if name in ("src", "href", "action", "onload")
        ]


def test_report_has_curves_examples_and_settings_and_needs_nothing_from_outside(tmp_path, capsys):
    node_with_history(tmp_path)
    account = "http://u:planted-secret@chain.example:8001"
    flat = {"node_state_dir": str(tmp_path), "chain_account_url": account}
    of = settings.from_flat(flat, "test")
    file = tmp_path / "report.html"
    training_report.run(of, argparse.Namespace(output=file))
    assert str(file) in capsys.readouterr().out
    text = file.read_text()
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert reader.outside == []
    assert re.findall(r"https?://[^/\s]*", text) == ["http://[redacted]@chain.example:8001"]
    assert "planted-secret" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert reader.tags.count("polyline") == 6
    assert "0.067 &gt; 0.900" in text
    assert "What is 2+2?" in text
    assert "0.600" in text
    assert "state_dir" in text
    assert len(text) < 100_000


def test_folder_without_a_node_is_named(tmp_path):
    of = settings.from_flat({"node_state_dir": str(tmp_path)}, "test")
    with pytest.raises(SettingsError, match="no node has run there"):
        training_report.run(of, argparse.Namespace(output=tmp_path / "report.html"))
    assert not (tmp_path / "report.html").exists()

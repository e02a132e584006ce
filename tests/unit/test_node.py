"""The round loop itself, of a node alone with the small model."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests import preloaded
from tests.groups import scored_group
from worker import enrolment, settings, signal_watch
from worker import node as node_module
from worker.chain.settlement import Settlement, SettlementStatus
from worker.environments.mixture import Mix
from worker.errors import TrainingError
from worker.node import Node
from worker.records import MAX_PART_TASKS, Collected, Place, Task
from worker.rounds import ChainClock
from worker.telemetry import metrics, status
from worker.trainer.trainer import Trainer

ROOT = Path(__file__).parents[2]


def enrolled(folder: Path, **flat) -> settings.Settings:
    """Settings of a node without peers and without a chain, enrolled."""
    made = settings.from_flat(
        {
            "node_state_dir": str(folder),
            "node_min_free_disk_mb": 1,
            "node_max_rounds": 6,
            "model_device": "cpu",
            "environment_families": [
                {"name": "gcd", "level": 0},
                {"name": "basic_arithmetic", "level": 0},
            ],
            "environment_tasks_per_round": 4,
            "generation_max_prompt_length": 128,
            "generation_max_completion_length": 8,
            "trainer_learning_rate": 3e-4,
            "swarm_enabled": False,
            **flat,
        },
        "test",
    )
    folder.mkdir(exist_ok=True)
    enrolment.run(made)
    return made


def make_node(checked: settings.Settings) -> Node:
    torch.set_num_threads(1)
    return Node(checked, *enrolment.load(checked))


def train(checked: settings.Settings) -> Node:
    node = make_node(checked)
    node.train()
    node.close()
    return node


def half_are_right(mix, task, texts):
    """Return rewards with a signal.

    With the rewards of real answers, chance would decide which rounds are trained on.
    """
    return [1.0, 0.0] * (len(texts) // 2)


KILLED = """
import os, signal, sys
from pathlib import Path
from worker import node, settings
from worker.chain.settlement import Settlement, SettlementStatus
from worker.environments.mixture import Mix
Mix.score = lambda mix, task, texts: [1.0, 0.0] * (len(texts) // 2)
append = node.RoundRecord.append
def append_or_die(record, folder):
    if record.round == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    append(record, folder)
node.RoundRecord.append = append_or_die
node.run(settings.load(Path(sys.argv[1])))
"""


def run_script(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    return preloaded.run(command, "worker.node", cwd=ROOT, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint_every", "killed_at", "num_lines"),
    [
        pytest.param(1, 3, 6, marks=pytest.mark.nightly),
        (3, 4, 7),
    ],  # after the checkpoint, before the line; and a round after one, which is made again
)
def test_history_has_each_round_once_whenever_the_node_is_killed(
    tmp_path, monkeypatch, checkpoint_every, killed_at, num_lines
):
    monkeypatch.setattr(Mix, "score", half_are_right)
    checked = enrolled(tmp_path, node_checkpoint_every=checkpoint_every)
    file = tmp_path / "settings.yaml"
    file.write_text(settings.dump(checked))
    killed = run_script(KILLED, file, str(killed_at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(checked)
    assert [line["round"] for line in status.read_rounds(tmp_path)] == list(range(6))
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == num_lines


class FewLooks:
    """A chain whose round advances after it was read a number of times."""

    def __init__(self, *num_looks):
        self.left = [round for round, num in enumerate(num_looks) for _ in range(num)]

    def current_round(self):
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def current_stage(self):
        return 0


def places(folder):
    return [(line["round"], line["part"]) for line in status.read_parts(folder)]


def with_chain(node, *num_looks):
    node.clock = ChainClock(FewLooks(*num_looks), poll_seconds=0.01)
    return node


def test_node_goes_on_while_the_round_is_open_and_reports_each_round_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Mix, "score", half_are_right)
    # A further part reads the chain before and in the middle of it.
    node = with_chain(make_node(enrolled(tmp_path, node_max_rounds=3)), 5, 1, 1)
    monkeypatch.setattr(node.pace, "patience", lambda: 0.0)
    node.train()
    node.close()
    assert places(tmp_path) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert [line["round"] for line in status.read_rounds(tmp_path)] == [0, 1, 2]
    shown = status.read(tmp_path)
    assert (shown.rounds_trained, shown.extra_steps, shown.extra_groups) == (3, 2, 8)
    again = make_node(enrolled(tmp_path))
    assert (again.last, again.status.extra_steps) == ((2, 0), 2)
    again.close()


def test_node_waits_when_the_limit_of_parts_is_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(Mix, "score", half_are_right)
    checked = enrolled(tmp_path, node_max_rounds=2, node_max_parts_per_round=2)
    node = with_chain(make_node(checked), 20, 1)
    monkeypatch.setattr(node.pace, "patience", lambda: 0.0)
    node.train()
    node.close()
    assert places(tmp_path) == [(0, 0), (0, 1), (1, 0)]


def test_node_begins_no_round_after_its_minutes_and_goes_on_when_started_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Mix, "score", half_are_right)
    node = make_node(enrolled(tmp_path, node_max_minutes=5.0))
    train_part = node._train_part

    def five_minutes_later(tick):
        train_part(tick)
        node.started -= 300.0

    monkeypatch.setattr(node, "_train_part", five_minutes_later)
    node.train()
    node.close()
    assert places(tmp_path) == [(0, 0)]
    train(enrolled(tmp_path, node_max_minutes=5.0, node_max_rounds=3))
    assert places(tmp_path) == [(0, 0), (1, 0), (2, 0)]


def none_differ_before_the_third_part(mix, task, texts):
    if task.index < 2 * MAX_PART_TASKS:
        return [0.01, 0.05] * (len(texts) // 2)
    return half_are_right(mix, task, texts)


def test_node_answers_further_parts_until_a_step_has_enough_groups_that_teach(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Mix, "score", none_differ_before_the_third_part)
    trained = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer,
        "step",
        lambda self, groups, **more: trained.append(len(groups)) or step(self, groups, **more),
    )
    node = with_chain(make_node(enrolled(tmp_path, node_max_rounds=2)), 1, 2)
    monkeypatch.setattr(node.pace, "patience", lambda: 0.0)
    node.train()
    node.close()
    lines = status.read_parts(tmp_path)
    assert [(line["round"], line["part"], line["parts"]) for line in lines] == [
        (0, 0, 3),
        (1, 0, 3),
    ]
    assert trained == [12, 12]
    # The reward is that of the first part, whose tasks are fixed before the round.
    assert [line["reward_mean"] for line in lines] == pytest.approx([0.03, 0.03])
    shown = status.read(tmp_path)
    assert (shown.rounds_trained, shown.extra_steps, shown.extra_groups) == (2, 0, 16)
    again = make_node(enrolled(tmp_path))
    assert again.last == (1, 2)  # the next step of this round would begin with part 3
    again.close()


def test_groups_of_a_peer_that_planted_text_do_not_count_as_enough(tmp_path, monkeypatch):
    node, parts = make_node(enrolled(tmp_path)), []
    monkeypatch.setattr(node, "_answer_place", lambda place: (parts.append(place.part) or [], 1.0))
    monkeypatch.setattr(node, "_publish", lambda *_: None)
    task = Task("gcd", "0" * 12, 1, 0)
    groups = [scored_group(task, "?", ("a", "b"), (0.0, 1.0), peer_id="QmPlanter")] * 20
    came = Collected(tuple(groups))
    assert node._answer_until_enough(Place(1, 0), [], came) == ([], came, 1)
    monkeypatch.setattr(node.trainer, "trusts", lambda group: group.peer_id != "QmPlanter")
    assert node._answer_until_enough(Place(1, 0), [], came) == ([], came, 3)
    assert parts == [1, 2]
    node.close()


def test_groups_that_come_while_a_further_part_is_answered_end_the_search(tmp_path, monkeypatch):
    node, parts = with_chain(make_node(enrolled(tmp_path)), 1), []
    monkeypatch.setattr(node, "_answer_place", lambda place: (parts.append(place.part) or [], 1.0))
    monkeypatch.setattr(node, "_publish", lambda *_: None)
    task = Task("gcd", "0" * 12, 1, 0)
    group = scored_group(task, "?", ("a", "b"), (0.0, 1.0), peer_id="QmPeer")
    early = Collected((group,), ("QmPeer", "QmSlow"), {"late": 1}, {0: 1})
    later = Collected((group,) * 20, ("QmOther",), {"late": 2}, {0: 15, 1: 5})
    monkeypatch.setattr(node, "_collect", lambda place: later)
    groups, collected, num_parts = node._answer_until_enough(Place(1, 0), [], early)
    assert (groups, parts, num_parts) == ([], [1], 2)
    assert collected == Collected((group,) * 21, ("QmOther", "QmPeer", "QmSlow"), {"late": 3})
    assert collected.behind == {0: 16, 1: 5}
    node.close()


def test_step_has_one_part_where_the_settings_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Mix, "score", none_differ_before_the_third_part)
    train(enrolled(tmp_path, node_max_rounds=2, node_max_parts_per_step=1))
    assert [line["parts"] for line in status.read_parts(tmp_path)] == [1, 1]


KILLED_IN_A_PART = """
import sys
from tests.unit import test_node
from worker import node
make = node.Node.__init__
def make_with_chain(self, *arguments):
    make(self, *arguments)
    test_node.with_chain(self, 100)
    self.pace.patience = lambda: 0.0
node.Node.__init__ = make_with_chain
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before the checkpoint", "after it"])
def test_killed_node_repeats_or_skips_no_part(tmp_path, monkeypatch, when):
    monkeypatch.setattr(Mix, "score", half_are_right)
    checked = enrolled(tmp_path, node_max_rounds=2)
    file = tmp_path / "settings.yaml"
    file.write_text(settings.dump(checked))
    die = "round == 0 and record.part == int(sys.argv[2])"
    script = KILLED_IN_A_PART + KILLED.replace("round == int(sys.argv[2])", die)
    if when == "before the checkpoint":
        script = script.replace("node.run(", KILL_AT_CHECKPOINT + "node.run(")
    killed = run_script(script, file, "2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    node = with_chain(make_node(checked), 3, 1)
    assert node.last == ((0, 1) if when == "before the checkpoint" else (0, 2))
    monkeypatch.setattr(node.pace, "patience", lambda: 0.0)
    node.train()
    node.close()
    found = places(tmp_path)
    assert found[:3] == [(0, 0), (0, 1), (0, 2)]
    assert found == sorted(set(found))
    assert found[-1] == (1, 0)
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == len(found)


KILL_AT_CHECKPOINT = """
save = node.checkpoint.save
def save_or_die(folder, trainer, state, keep):
    if state["further"]["part"] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(folder, trainer, state, keep)
node.checkpoint.save = save_or_die
"""


def test_node_whose_process_the_kernel_ended_for_its_memory_takes_less(tmp_path):
    checked = enrolled(tmp_path)
    make_node(checked).close()
    (tmp_path / "memory-killed").touch()
    for _ in range(2):  # once for each time that it was
        node = make_node(checked)
        node.close()
        assert node.trainer.budget.tokens == checked.trainer.max_tokens_per_micro_batch // 2


def test_device_is_in_status_and_metrics(tmp_path):
    node = make_node(enrolled(tmp_path, node_name="one"))
    node.close()
    assert json.loads((tmp_path / "status.json").read_text())["device"] == "cpu"
    assert (
        'hivewright_device_info{device="cpu",node="one"} 1.0'
        in metrics.render(status.read(tmp_path)).splitlines()
    )


def test_rounds_without_a_step_write_no_more_checkpoints_than_others(tmp_path, monkeypatch):
    node = make_node(enrolled(tmp_path, node_checkpoint_every=3))
    monkeypatch.setattr(
        node.environment, "score", lambda task, texts: [0.5] * len(texts)
    )  # no signal
    for _ in range(4):
        node._train_part(node._next_round())
    node.close()
    assert [line["skipped"] for line in status.read_rounds(tmp_path)] == ["no-signal"] * 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-00000001"]


@pytest.mark.parametrize(("reward", "earned"), [(1.0, 1000), (0.0, 0)])
def test_round_that_teaches_nothing_earns_what_its_answers_are_worth(
    tmp_path, monkeypatch, reward, earned
):
    """A node that has solved all tasks, or none, reports all the same: others wait for it."""
    node = make_node(enrolled(tmp_path))
    settlement = Mock(spec=Settlement)
    settlement.status.return_value = SettlementStatus(0, 0, 0, 0, 0, None)
    monkeypatch.setattr(node, "settlement", settlement)
    monkeypatch.setattr(node.environment, "score", lambda task, texts: [reward] * len(texts))
    tick = node._next_round()
    for _ in range(2):
        node._train_part(tick)  # the second is a further part of the same round
    assert [line["skipped"] for line in status.read_rounds(tmp_path)] == ["no-signal"]
    assert [row.reward for row in node.ledger.rows()] == [earned]
    settlement.wake.assert_called_once_with()
    assert node.status.rounds_trained == 0
    node.close()


def test_many_rounds_without_a_learning_signal_are_logged_with_advice(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(signal_watch, "WARN_AFTER_ROUNDS", 2)
    node = make_node(enrolled(tmp_path))
    rewards = [0.5] * 8
    monkeypatch.setattr(node.environment, "score", lambda task, texts: rewards)
    for _ in range(5):
        node._train_part(node._next_round())
    said = [r.getMessage() for r in caplog.records if "no learning signal" in r.getMessage()]
    assert [text.split("rounds_in_a_row=")[1].split()[0] for text in said] == ["2", "4"]
    task, closed, bare = Task("gcd", "0" * 12, 1, 0), ("<answer>1</answer>",) * 2, ("1",) * 2
    limit = node.settings.generation.max_completion_length

    def cut_at(length):
        return scored_group(
            task, "?", bare, (0.0, 0.0), [(1,) * length] * 2, truncated=(True, True)
        )

    advise = node.signal_watch._advise
    assert "100% of the answers were cut off at" in advise([cut_at(limit)])
    assert "cut off" not in advise([cut_at(limit - 1)])
    unclosed = [scored_group(task, "?", bare, (0.0, 0.0), truncated=(False, False))]
    assert "0% of the answers closed their <answer> tag, asked in the form system" in advise(
        unclosed
    )
    assert "name easier tasks in environment.families" in node.signal_watch._advise(
        [scored_group(task, "?", closed, (0.0, 0.0), truncated=(False, False))]
    )
    rewards[0] = 1.0
    node._train_part(node._next_round())
    node.close()
    assert node.signal_watch.rounds_without == 0


def test_groups_that_were_not_trained_on_stand_in_the_history_by_reason(tmp_path, monkeypatch):
    node = make_node(enrolled(tmp_path, node_max_parts_per_step=1))
    rewards = iter([[1.0, 0.0] * 4, [0.0, math.nan] * 4, [1.0] * 8, [0.5] * 8])
    monkeypatch.setattr(node.environment, "score", lambda task, texts: next(rewards))
    monkeypatch.setattr(node_module, "is_closed", lambda text: False)  # no credit for the format
    node._train_part(node._next_round())
    node.close()
    (line,) = status.read_rounds(tmp_path)
    assert (line["groups_local"], line["skipped"]) == (1, None)
    assert {
        why: n for why, n in line["groups_dropped"].items() if not why.startswith("missing")
    } == {
        "non-finite-reward-local": 1,
        "no-signal-local": 2,
    }


def test_broken_weights_stop_the_node_and_leave_the_checkpoint_before_them(tmp_path, monkeypatch):
    node = make_node(enrolled(tmp_path, node_keep_checkpoints=1, trainer_max_nonfinite_steps=3))
    score = [1.0, 0.0] * 4
    monkeypatch.setattr(node.environment, "score", lambda task, texts: score)
    node._train_part(node._next_round())
    monkeypatch.setattr(Trainer, "learning_rate", 1e20)
    with pytest.raises(
        TrainingError,
        match=r"3 non-finite steps in a row .* resumes from the checkpoint before them",
    ):
        node.train()
    node.close()
    assert [line["skipped"] for line in status.read_rounds(tmp_path)] == [
        None,
        None,
        "non-finite",
        "non-finite",
    ]
    monkeypatch.undo()
    again = make_node(enrolled(tmp_path))
    assert (again.status.rounds_trained, again.trainer.is_sound()) == (1, True)
    again.close()

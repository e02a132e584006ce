"""When a node evaluates itself, also after a restart."""

from types import SimpleNamespace

import pytest

from worker import evaluation, settings
from worker.held_out import HeldOut
from worker.telemetry import evaluation_log
from worker.telemetry.evaluation_log import Evaluation
from worker.telemetry.status import NodeStatus


def of_node(folder, every, trained=0) -> tuple[HeldOut, NodeStatus]:
    status = NodeStatus("a", "Qm", "a b c", "m", "0.1.0", rounds_trained=trained)
    made = settings.from_flat(
        {"node_state_dir": str(folder), "node_eval_every_rounds": every}, "test"
    )
    environment = SimpleNamespace(names=(), levels={})
    return HeldOut(made, None, environment, status), status


@pytest.fixture
def measured(monkeypatch):
    """Replace the evaluation; return the arguments of each."""
    asked = []

    def measure(*_, rounds_trained, round, **others):
        asked.append((rounds_trained, round, others["seconds"]))
        return Evaluation(round, rounds_trained, 1e9, 0.5, rounds_trained / 100, ())

    monkeypatch.setattr(evaluation, "measure", measure)
    return asked


def test_untouched_model_and_every_nth_round_are_evaluated(tmp_path, measured):
    held_out, status = of_node(tmp_path, 3)
    for trained in range(8):
        status.rounds_trained = status.round = trained
        while held_out.is_due():
            held_out.evaluate(lambda: None)
    assert [(trained, round) for trained, round, _ in measured] == [(0, None), (3, 3), (6, 6)]
    assert (status.held_out_before, status.held_out_now) == (0.0, 0.06)


def test_restart_repeats_no_evaluation_and_keeps_the_first(tmp_path, measured):
    for trained in (0, 3, 3, 4):
        held_out, status = of_node(tmp_path, 3, trained)
        if held_out.is_due():
            held_out.evaluate(lambda: None)
    assert [trained for trained, _, _ in measured] == [0, 3]
    assert (status.held_out_before, status.held_out_now) == (0.0, 0.03)
    assert len(evaluation_log.read(tmp_path)) == 2


def test_node_without_evaluations_is_never_due(tmp_path):
    held_out, status = of_node(tmp_path, None)
    assert not held_out.is_due()
    assert (status.held_out_before, status.held_out_now) == (None, None)


def test_progress_is_reported_before_the_model_is_busy(tmp_path, measured):
    held_out, _ = of_node(tmp_path, 1)
    seen = []
    held_out.evaluate(lambda: seen.append(len(measured)))
    assert seen == [0]


def test_evaluation_that_fails_is_tried_at_the_next_time_alone(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "measure", fail)
    held_out, _ = of_node(tmp_path, 1)
    with pytest.raises(OSError, match="No space"):
        held_out.evaluate(lambda: None)
    assert not held_out.is_due()

"""The seconds of a node's activities add up to the time that passed."""

from worker.telemetry.stopwatch import Stopwatch


def test_each_second_belongs_to_one_activity() -> None:
    now = [10.0]
    watch = Stopwatch(lambda: now[0])
    watch.begin("generating")
    now[0] += 3
    watch.begin("exchanging")
    now[0] += 2
    watch.move(1.5, "exchanging", "waiting")
    watch.begin("training")
    now[0] += 1
    assert watch.take() == {"waiting": 1.5, "generating": 3, "exchanging": 0.5, "training": 1}
    now[0] += 4
    assert watch.take() == {"training": 4}

"""The chart of a game's prices: inside of its frame, in steps, and honest about its end."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.market_view import price_chart
from worker.market_view.games import Bet, Game
from worker.market_view.price_chart import NUM_STYLES, Chart

TIMES = st.floats(1000.0, 5000.0)
BETS = st.builds(
    Bet,
    st.sampled_from("abc"),
    st.just(0),
    st.integers(0, 2),
    st.floats(0, 1e30),
    st.floats(0, 1e30),
    TIMES,
)


def corners(chart: Chart) -> list[list[tuple[float, float]]]:
    found = []
    for line in chart.lines:
        pairs = (corner.split(",") for corner in line.points.split())
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


def drawn(game: Game, now: float = 6000.0) -> Chart:
    chart = price_chart.draw(game, now)
    assert chart is not None
    return chart


@given(st.lists(BETS, max_size=8), st.lists(TIMES, max_size=4), st.none() | TIMES)
def test_every_game_is_drawn_inside_of_its_frame(bets, round_ends, ended_at):
    ends = sorted(round_ends)
    game = Game(3, 4, 3, 1000.0, round_ends=ends, ended_at=ended_at, bets=bets)
    chart = drawn(game, max([6000.0, *ends]))
    for line in corners(chart):
        assert [x for x, _ in line] == sorted(x for x, _ in line)
        assert line[0][0] == chart.left
        assert line[-1][0] == chart.right
        assert all(chart.top <= y <= chart.bottom for _, y in line)
        for (x, y), (next_x, next_y) in itertools.pairwise(line):
            assert x == next_x or y == next_y
    assert sum(line.probability for line in chart.lines) == pytest.approx(1.0)
    assert all(x >= chart.left for x, _ in chart.x_marks)


def test_open_game_is_drawn_up_to_now_and_one_that_ended_up_to_its_end():
    bet = Bet("a", 0, 0, 1.0, 100.0, 1500.0)
    for changes, now, share in (
        ({}, 2000.0, 0.5),
        ({}, 3000.0, 0.25),
        ({"ended_at": 2000.0}, 9999.0, 0.5),
        ({"round_ends": [1250.0, 2000.0]}, 9999.0, 0.5),
        ({"round_ends": [1250.0]}, 2000.0, 0.5),
    ):
        game = Game(3, 2, 2, 1000.0, bets=[bet], **changes)
        chart = drawn(game, now)
        x = next(x for x, y in corners(chart)[0] if y != corners(chart)[0][0][1])
        assert x == pytest.approx(chart.left + share * (chart.right - chart.left), abs=0.1)


def test_bet_moves_its_choice_up_and_the_others_down():
    game = Game(3, 1, 3, 1000.0, bets=[Bet("a", 0, 1, 5.0, 50.0, 1500.0)])
    for number, line in enumerate(corners(drawn(game))):
        first, last = line[0][1], line[-1][1]
        assert (last < first) == (number == 1)


def test_marks_that_would_overlap_have_no_text():
    ends = [1000.0 + 10 * number for number in range(1, 40)]
    chart = drawn(Game(3, 40, 2, 1000.0, round_ends=ends), 1400.0)
    texts = [(x, text) for x, text in chart.x_marks if text]
    assert len(chart.x_marks) == 40
    assert texts[0][1] == "round 0"
    assert all(later - x >= 60 for (x, _), (later, _) in itertools.pairwise(texts))


def test_styles_repeat_after_the_last_one():
    chart = drawn(Game(3, 1, NUM_STYLES + 2, 1000.0))
    assert [line.style for line in chart.lines] == [*range(NUM_STYLES), 0, 1]


@pytest.mark.parametrize(
    ("right", "marked"), [(None, [None, None]), (0, [True, False]), (1, [False, True])]
)
def test_right_choice_is_marked_when_it_is_known(right, marked):
    chart = drawn(Game(3, 1, 2, 1000.0, right_choice=right, choices=("cat", "dog")))
    assert [line.is_right for line in chart.lines] == marked
    assert [line.name for line in chart.lines] == ["cat", "dog"]
    assert chart.description.endswith("in game 3, at the end: cat 50%, dog 50%")


def test_axis_is_from_nothing_to_certainty():
    chart = drawn(Game(3, 1, 2, 1000.0))
    middle = (chart.top + chart.bottom) / 2
    assert chart.y_marks == ((chart.bottom, "0%"), (middle, "50%"), (chart.top, "100%"))

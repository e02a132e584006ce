"""Draw a game's prices over time as lines of an inline SVG, without a script."""

from collections.abc import Iterable
from dataclasses import dataclass

from worker.market_view.games import Game

WIDTH, HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 26
NUM_STYLES = 6
"""Colours with their dashes (market.css); more choices repeat them."""


@dataclass(frozen=True, slots=True)
class Line:
    """The line of a choice. `probability`: the last one. `is_right`: None while not revealed."""

    name: str
    style: int
    points: str
    probability: float
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of WIDTH times HEIGHT; marks are positions with their texts."""

    lines: tuple[Line, ...]
    y_marks: tuple[tuple[float, str], ...]
    x_marks: tuple[tuple[float, str], ...]
    left: int
    right: int
    top: int
    bottom: int
    description: str


def draw(game: Game, now: float) -> Chart | None:
    """Return the chart of a game up to `now` (Unix time); None if its prices are not known."""
    points = game.beliefs()
    if not points:
        return None
    end = max(_end(game, now), points[-1][0], game.opened_at + 1.0)

    def x_of(at: float) -> float:
        share = (at - game.opened_at) / (end - game.opened_at)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    lines = []
    for choice in range(game.num_choices):
        values = [(x_of(at), _y_of(beliefs[choice])) for at, beliefs in points]
        last = points[-1][1][choice]
        is_right = None if game.right_choice is None else choice == game.right_choice
        path = " ".join(f"{x},{y}" for x, y in _steps([*values, (x_of(end), _y_of(last))]))
        lines.append(Line(game.name_of(choice), choice % NUM_STYLES, path, last, is_right))
    starts = [game.opened_at, *game.round_ends]
    x_marks = [(x_of(at), f"round {i}") for i, at in enumerate(starts[: game.num_rounds])]
    return Chart(
        lines=tuple(lines),
        y_marks=tuple((_y_of(share), f"{share:.0%}") for share in (0.0, 0.5, 1.0)),
        x_marks=_apart(x_marks),
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        description=_described(game, lines),
    )


def _end(game: Game, now: float) -> float:
    """Return the time up to which prices are drawn: no bet is taken after the last round."""
    if len(game.round_ends) >= game.num_rounds:
        return game.round_ends[-1]
    return now if game.ended_at is None else game.ended_at


def _y_of(share: float) -> float:
    return round(_TOP + (1 - share) * (HEIGHT - _TOP - _BOTTOM), 1)


def _steps(values: list[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """Yield the corners of a line that keeps each value until the next one."""
    height = values[0][1]
    for x, y in values:
        yield x, height
        if y != height:
            yield x, y
        height = y


def _apart(marks: list[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Return the marks with the texts left out that would overlap the one before."""
    free, shown = 0.0, []
    for x, text in marks:
        shown.append((x, text if x >= free else ""))
        free = x + 60 if x >= free else free
    return tuple(shown)


def _described(game: Game, lines: list[Line]) -> str:
    last = ", ".join(f"{line.name} {line.probability:.0%}" for line in lines)
    return f"Probability of each choice over time in game {game.number}, at the end: {last}"

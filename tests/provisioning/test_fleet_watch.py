"""The live view of a fleet: what it shows, and its lines without a terminal."""

import argparse
import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from deploys.fleet import commands, queries, watch
from deploys.fleet.commands import new_lines, with_place
from deploys.fleet.watch import BARS, TREND_ROUNDS, Trends, screen, sparkline

STATE = {
    "commit": "a" * 40,
    "deployed": "b",
    "previous": None,
    "disk_free_mb": 50_000,
    "disk_total_mb": 90_000,
    "tailscale": None,
    "gpus": [],
    "problem": None,
}


def report(round: int, reward: float, **changes: Any) -> dict[str, Any]:
    status = {
        "state": "connected",
        "round": round,
        "reward_mean": reward,
        "peers_heard": 2,
        "ledger": {"earned": round, "confirmed": round},
        "animal_name": "quick brown otter",
        "updated_at": 4e9,
        "warnings": [],
    }
    return {
        "unit": "hivewright-worker@0.service",
        "active_state": "active",
        "status": status,
        "started_at": 1.0,
        "restarts": 0,
        "exit_status": 0,
        "finished": [float(round - 1), float(round)],
        "rewards": [reward - 0.1, reward],
    } | changes


def looked(round: int, reward: float, **changes: Any) -> queries.Looked:
    return queries.Looked({"gpu-1": STATE}, {"gpu-1": [report(round, reward, **changes)]})


def test_sparkline_is_from_0_to_1() -> None:
    assert sparkline([0.0, 0.5, 1.0, 7.0, -1.0]) == f"{BARS[0]}{BARS[4]}{BARS[7]}{BARS[7]}{BARS[0]}"
    assert sparkline([]) == ""


def test_trends_join_the_reports_of_all_looks_and_stay_bounded() -> None:
    trends = Trends()
    for round in range(1, 60):
        trends.see(looked(round, min(1.0, round / 59)).reports)
    ((name, line, last),) = trends.rows()
    assert (name, len(line), last) == ("gpu-1/worker@0", TREND_ROUNDS, 1.0)
    assert line[-1] == BARS[7]


def test_screen_has_table_curves_and_hosts_that_do_not_answer() -> None:
    trends = Trends()
    found = looked(7, 0.9)
    found.reasons["gpu-2"] = "no answer\x1b[2J"
    trends.see(found.reports)
    units = {"gpu-1": ["hivewright-worker@0.service"], "gpu-2": ["hivewright-worker@0.service"]}
    console = Console(file=io.StringIO(), width=120)
    console.print(screen(units, found, trends, 120))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "gpu-1/worker@0" in text
    assert sparkline([0.8, 0.9]) in text
    assert "gpu-2: no answer" in text
    assert "unreachable" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_screen_fits_the_terminal(width: int) -> None:
    trends, found = Trends(), queries.Looked()
    for number in range(3):
        host = f"gpu-host-{number:02}.example"
        for round in range(1, 40):
            rewards = {"finished": [float(round)], "rewards": [round / 40]}
            told = report(round, round / 40, **rewards)
            told["status"] |= {"swarm": {"peers_known": 99}, "state": "training-alone"}
            found.states[host], found.reports[host] = STATE, [told]
            trends.see(found.reports)
    units = {host: ["hivewright-worker@0.service"] for host in found.reports}
    console = Console(file=io.StringIO(), width=width)
    console.print(screen(units, found, trends, width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert sum(BARS[7] in line for line in lines) == 3
    text = "\n".join(lines)
    for word in ("gpu-host-02", "training-alone", "Ctrl-C ends"):
        assert word in text


def test_lines_of_a_pipe_are_whole_however_narrow_the_terminal_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    error = f"no checkpoint is written: {'x' * 200}\x1b[2J"
    told = looked(7, 0.9)
    told.reports["gpu-1"][0]["status"]["last_error"] = error
    console = Console()
    watch._print_changes(console, told, {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("x\\x1b[2J")
    assert "gpu-1/worker@0 active state=connected round=7" in line


def test_without_a_terminal_there_is_a_line_for_each_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([looked(7, 0.9), looked(7, 0.9), looked(8, 0.5, active_state="failed")])
    hosts = [{"name": "gpu-1", "groups": ["workers"], "data": {}}]
    monkeypatch.setattr(watch.Pyinfra, "of_operator", lambda _: None)
    monkeypatch.setattr(commands, "chosen_hosts", lambda *_: hosts)
    monkeypatch.setattr(queries, "look", lambda *_: next(looks))
    watch.run(argparse.Namespace(inventory="x.py", limit=None, every=0, times=3))
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "gpu-1/worker@0 active state=connected round=7 reward_mean=0.900 peers_heard=2",
        "gpu-1/worker@0 failed state=connected round=8 reward_mean=0.500 peers_heard=2",
    ]


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ((), "abc", "abc"),
        ("abc", "abc", ""),
        ("abc", "bcde", "de"),
        ("aaa", "aaaa", "a"),
        ("abc", "xyz", "xyz"),
        ("abc", "", ""),
    ],
)
def test_following_prints_each_line_once(before: str, now: str, new: str) -> None:
    assert "".join(new_lines(list(before), list(now))) == new


def test_line_of_a_log_begins_with_host_and_slot() -> None:
    line = "2026-11-29T23:00:00+0000 hivewright-worker@0[812]: round finished round=3"
    assert with_place("gpu-1", line) == (
        "gpu-1/worker@0 2026-11-29T23:00:00+0000 round finished round=3"
    )
    assert with_place("gpu-1", "-- Boot --") == "gpu-1 -- Boot --"


def test_follow_goes_on_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = [["a"], ["a", "b"], ["b", "c"]]

    def ask(*_: Any) -> Any:
        if not looks:
            raise KeyboardInterrupt
        reasons = {} if len(looks) > 1 else {"gpu-2": "gone"}
        return queries.Answers([{"gpu-1": looks.pop(0)}], reasons)

    def name(*_: Any) -> list[str]:
        return ["gpu-1", "gpu-2"]

    of_operator: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(commands, "pyinfra_of", of_operator)
    monkeypatch.setattr(commands, "chosen", name)
    monkeypatch.setattr(commands, "FOLLOW_SECONDS", 0)
    monkeypatch.setattr(queries, "ask", ask)
    options = argparse.Namespace(limit=None, lines=5, unit="*", follow=True, inventory="x.py")
    with pytest.raises(KeyboardInterrupt):
        commands.logs(options)
    said = capsys.readouterr()
    assert said.out.splitlines() == ["gpu-1 a", "gpu-1 b", "gpu-1 c"]
    assert "gpu-2 does not answer: gone" in said.err

"""When a host's Tailscale key expires, asked from a program that answers as `tailscale` does."""

import json
import os
from pathlib import Path

import pytest

from worker.runtime import tailscale_key
from worker.runtime.tailscale_key import SOON_SECONDS, expires_at, parse, problem

DAY = 86400.0


def test_expiry_is_read_with_any_zone_and_fraction() -> None:
    for text in ("2027-01-01T00:00:00Z", "2027-01-01T02:00:00+02:00"):
        assert parse(json.dumps({"Self": {"KeyExpiry": text}})) == 1798761600
    precise = json.dumps({"Self": {"KeyExpiry": "2027-01-01T00:00:00.5Z"}})
    assert parse(precise) == 1798761600.5


@pytest.mark.usefixtures("usual_recursion_limit")
@pytest.mark.parametrize(
    "answer",
    [
        "",
        "failed to connect to local tailscaled",
        "{}",
        '{"Self": null}',
        '{"Self": {}}',
        '{"Self": {"KeyExpiry": null}}',
        '{"Self": {"KeyExpiry": "soon"}}',
        "[" * 100_000,
    ],
)
def test_answer_without_an_expiry_is_a_key_that_does_not_expire(answer: str) -> None:
    assert parse(answer) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, None),
        (SOON_SECONDS + 1, None),
        (SOON_SECONDS - 1, "expires in 7 days"),
        (2 * DAY, "expires in 2 days"),
        (-3 * DAY, "expired 3 days ago"),
        (SOON_SECONDS, "expires in 7 days"),
        (1, "expires in 0 days"),
        (0, "expired 0 days ago"),
        (-1, "expired 0 days ago"),
    ],
)
def test_key_that_expires_soon_is_a_problem_with_what_to_do(
    seconds: float | None, words: str | None
) -> None:
    found = problem(None if seconds is None else 1e9 + seconds, 1e9)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert f"the Tailscale key {words}" in found
        assert found.endswith(tailscale_key.RENEW)


def test_program_is_asked_and_one_that_hangs_or_is_missing_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "tailscale"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tailscale_key, "QUERY_SECONDS", 0.5)

    def answers(script: str) -> float | None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return expires_at()

    told = '[ "$1 $2" = "status --json" ] && echo \'{"Self": {"KeyExpiry": "2027-01-01T00:00Z"}}\''
    assert answers(told) == 1798761600
    assert answers("echo not running >&2; exit 1") is None
    assert answers("exec sleep 20") is None
    assert answers(r"printf '\377\376'") is None
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert expires_at() is None

"""Answers of a host are cached until something changes the host."""

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_answers_are_asked_once_and_again_after_something_was_done(tmp_path: Path) -> None:
    count = tmp_path / "count"
    deploy = Path(__file__).with_name("fact_cache_deploy.py")
    command = [
        sys.executable,
        "-m",
        "pyinfra",
        "-y",
        "@local",
        deploy,
        "--data",
        f"count_file={count}",
    ]
    done = subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    # Asked ahead, and never again before the first operation; the second one comes after a change.
    assert (tmp_path / "count.said").read_text().splitlines() == ["[1, 1]=1", "second=2"]
    assert "nonsense" not in done.stderr

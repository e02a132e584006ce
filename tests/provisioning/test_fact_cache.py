"""Answers of a host are cached until something changes the host."""

from pathlib import Path

from fake_hosts import pyinfra


def test_answers_are_asked_once_and_again_after_something_was_done(tmp_path: Path) -> None:
    count = tmp_path / "count"
    deploy = Path(__file__).with_name("fact_cache_deploy.py")
    done = pyinfra("-y", "@local", deploy, "--data", f"count_file={count}")
    assert done.returncode == 0, done.stderr
    # Asked ahead, and never again before the first operation; the second one comes after a change.
    assert (tmp_path / "count.said").read_text().splitlines() == ["[1, 1]=1", "second=2"]
    assert "nonsense" not in done.stderr

"""Pages over 1,000 peers and 100,000 rounds, and the packaged chart library."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.dashboard import measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(120)
def test_pages_are_small_however_long_the_history_is() -> None:
    for page, figures in measure(1_000, 100_000).items():
        assert figures["bytes"] < 200_000, page


def test_packaged_uplot_is_what_was_published() -> None:
    done = subprocess.run([ROOT / "scripts/uplot", "--check"], check=False, timeout=60)
    assert done.returncode == 0

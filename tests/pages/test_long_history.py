"""Pages over 1,000 peers and 100,000 rounds, and the packaged chart library."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.dashboard import measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(120)
def test_pages_are_small_and_fast_however_long_the_history_is() -> None:
    for page, figures in measure(1_000, 100_000).items():
        assert figures["bytes"] < 200_000, page
        assert figures["seconds"] < 2.0, page  # about 0.3 with a free core


def test_packaged_uplot_is_what_was_published() -> None:
    subprocess.run([ROOT / "scripts/uplot", "--check"], check=True, timeout=60)

"""trackio's own page shows a run that our tracker wrote.

Skipped without trackio: `scripts/environment FOLDER trackers` makes an environment that has it.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.telemetry.test_tracking import log_rounds
from worker.runtime import host

pytest.importorskip("trackio")
PATIENCE_SECONDS = 60.0
_SHOW = """
import sys, trackio
port = int(sys.argv[1])
trackio.show(project="hivewright", open_browser=False, host="127.0.0.1", server_port=port)
"""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """Write three rounds, and serve trackio's page of them; yield its URL."""
    log_rounds(tmp_path, trackio=True)
    port = host.free_ports(["page"])["page"]
    own = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", _SHOW, str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "launched at" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_shows_the_run_with_its_curves(page: str, tmp_path: Path) -> None:
    flags = ("headless", "no-sandbox", "disable-background-networking", "dump-dom")
    budget, own = "--virtual-time-budget=20000", f"--user-data-dir={tmp_path}/browser"
    shown = subprocess.run(
        ["chromium", *(f"--{flag}" for flag in flags), budget, own, f"{page}/?project=hivewright"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "gpu-1" in shown
    for figure in ("entropy", "reward", "low_mean", "level_2/mean"):
        assert re.search(f">\\s*{figure}\\s*<", shown), figure

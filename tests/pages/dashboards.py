"""A dashboard as the process that it is, for the tests of what it says and of its page."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from tests import preloaded
from worker import settings
from worker.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2


class Dashboard:
    """The process `hivewright dashboard`, at `url`; its state is in `folder`."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder

    def said(self, what: str = "swarm") -> dict[str, Any]:
        answer = requests.get(f"{self.url}/api/{what}", timeout=10)
        assert answer.status_code == 200
        return dict(answer.json())

    def says(
        self,
        condition: Callable[[dict[str, Any]], object],
        seconds: float = 30.0,
        what: str = "swarm",
    ) -> dict[str, Any]:
        """Return the answer of /api/WHAT as soon as the condition is true."""
        deadline = time.monotonic() + seconds
        while not condition(said := self.said(what)):
            assert time.monotonic() < deadline, json.dumps(said, indent=1)
            time.sleep(0.05)
        return said


def with_dashboard(of: Settings, folder: Path, **changes: object) -> Settings:
    """These settings, with those of a dashboard that keeps its things in `folder`."""
    section = settings.Dashboard(port=0, state_dir=folder).model_copy(update=changes)
    patient = of.chain.model_copy(update={"poll_seconds": POLL_SECONDS, "timeout_seconds": 5.0})
    return of.model_copy(update={"dashboard": section, "chain": patient})


@contextmanager
def showing(of: Settings) -> Iterator[Dashboard]:
    """The dashboard of these settings, as the process that it is, until the block ends."""
    folder = of.dashboard.state_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dashboard.yaml").write_text(settings.dump(of))
    (folder / "address").unlink(missing_ok=True)  # of an earlier process
    log = folder / "log"
    command = [sys.executable, "-m", "worker", "dashboard", "--settings", folder / "dashboard.yaml"]
    with log.open("w") as stderr:
        process = preloaded.Popen(command, "worker.dashboard.server", stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "address").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Dashboard((folder / "address").read_text().strip(), folder)
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, log.read_text()

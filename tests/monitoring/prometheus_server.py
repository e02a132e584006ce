"""Debian's Prometheus on loopback, for tests that load our files into it."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import machine

PATIENCE_SECONDS = 15.0


def why_no_prometheus() -> str | None:
    """Return why there is no Prometheus, in one line, or None; installs it if it can."""
    return machine.lacking(
        "the tests of monitoring", {"prometheus": "prometheus", "promtool": "prometheus"}
    )


def promtool(*arguments: str | Path) -> str:
    """Return promtool's output; raises CalledProcessError if it refuses."""
    program = shutil.which("promtool") or "promtool"
    done = subprocess.run([program, *map(str, arguments)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(config: Path, data: Path) -> Iterator[str]:
    """Run Prometheus and yield its URL; everything that it logs is in `data`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = shutil.which("prometheus") or "prometheus"
    arguments = (f"--storage.tsdb.path={data}", f"--web.listen-address=127.0.0.1:{port}")
    with (data.parent / "prometheus.log").open("w") as log:
        process = subprocess.Popen([program, f"--config.file={config}", *arguments], stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def ask(url: str) -> Any:
    """Return the `data` of an answer of Prometheus, as soon as it answers."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

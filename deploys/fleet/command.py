"""Running pyinfra as a program of its own: its CLI patches the process that it runs in."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.errors import WorkerError

CHECKOUT = Path(__file__).parents[2]
PYINFRA = (sys.executable, "-m", "pyinfra")


def deploy(inventory: str, *, prefix: Sequence[str] = (), timeout: float) -> int:
    """Run the whole deploy, with pyinfra's own output on this terminal; return its exit code."""
    return _run([*prefix, *PYINFRA, "-y", inventory, "deploy.py"], timeout, capture=False).returncode


def deploy_json(inventory: str, *, prefix: Sequence[str] = (), timeout: float) -> dict[str, Any]:
    """Run the whole deploy; return pyinfra's results: operations with their hosts, totals, failed hosts."""
    results: dict[str, Any] = _json([*prefix, *PYINFRA, "-y", "--json", inventory, "deploy.py"], timeout)["results"]
    return results


def facts(inventory: str, fact: str, *, prefix: Sequence[str] = (), timeout: float) -> dict[str, Any]:
    """Value of a fact (`module.Class`) by host. Hosts that can't be reached are not in it."""
    by_fact: dict[str, dict[str, Any]] = _json([*prefix, *PYINFRA, "--json", inventory, "fact", fact], timeout)
    return next(iter(by_fact.values()))


def host_names(inventory: str, *, prefix: Sequence[str] = (), timeout: float) -> list[str]:
    """Every host of the inventory, in its order. Connects to none."""
    listed: list[dict[str, Any]] = _json([*prefix, *PYINFRA, "--json", inventory, "debug-inventory"], timeout)
    return [host["name"] for host in listed]


def _json(command: Sequence[str], timeout: float) -> Any:
    done = _run(command, timeout, capture=True)
    try:
        return json.loads(done.stdout)
    except ValueError:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise WorkerError(said[-1] if said else f"pyinfra ended with code {done.returncode} and said nothing") from None


def _run(command: Sequence[str], timeout: float, capture: bool) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=CHECKOUT, timeout=timeout, capture_output=capture, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise WorkerError(f"pyinfra had not ended after {timeout:g} s and was stopped; run it again") from None

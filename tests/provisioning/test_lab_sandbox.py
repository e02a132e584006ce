"""The sandbox of code tasks within the worker's unit: the unit must allow what it needs."""

import json
from pathlib import Path

import pytest

from lab.lab import Lab
from lab.lab_host import CHECKOUT
from worker.environments import sandbox

pytestmark = [pytest.mark.lab, pytest.mark.slow]


def hardening() -> list[str]:
    """Return the restrictions in the unit's template."""
    text = (CHECKOUT / "templates/service.j2").read_text()
    _, _, tail = text.partition("# What it may do on this machine")
    lines = tail.partition("{% block more")[0].splitlines()[1:]
    assert "RestrictNamespaces=yes" in lines
    # Values that are filled in say nothing of the sandbox; comments and tags are no properties.
    return [line for line in lines if line and not line.startswith("#") and "{" not in line]


def job(program: str, entry: str) -> str:
    limits = {
        "cpu_seconds": 1,
        "wall_seconds": 15,
        "memory_bytes": sandbox.MEMORY_BYTES,
        "output_bytes": 65536,
    }
    return json.dumps({"program": program, "entry": entry, "inputs": [[1]], **limits})


def test_sandbox_holds_within_the_worker_s_unit(lab: Lab) -> None:
    host = lab.host(1)
    inner = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    (host.root / "opt/sandboxed.py").write_text(inner)
    jobs = [
        job(sandbox._PROBE, "probe"),
        job("def f(x): return x + 1", "f"),
        job("while True: pass", "f"),
    ]
    (host.root / "opt/jobs").write_text("\n".join(jobs) + "\n")
    properties = " ".join(f"--property='{line}'" for line in ["User=nobody", *hardening()])
    script = (
        f"systemd-run --wait --pipe --quiet {properties} sh -c 'python3 -I -S /opt/sandboxed.py <"
        " /opt/jobs'"
    )
    replies = [json.loads(line) for line in host.ssh(script, timeout=90).stdout.splitlines()]
    assert all(reply["sealed"] for reply in replies)
    assert [reply["outputs"] for reply in replies] == ['["[]"]', '["2"]', None]

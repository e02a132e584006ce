"""Hosts that cannot run the services are refused before any change, with advice."""

import os
import subprocess
from pathlib import Path

import pytest

from deploys.hardware import MissingParts


def ask(folder: Path, *, systemd: bool, path: str | None = None) -> str | None:
    """Ask the fact through a real shell, with /run/systemd/system in a temporary folder."""
    booted = folder / "booted"
    if systemd:
        booted.mkdir()
    script = MissingParts().command().replace("/run/systemd/system", str(booted))
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        env=os.environ | ({"PATH": path} if path else {}),
    )
    lines = done.stdout.splitlines()
    return MissingParts().process(lines) if lines else MissingParts.default()


def test_host_with_systemd_and_apt_has_all(tmp_path: Path) -> None:
    assert ask(tmp_path, systemd=True) is None


def test_host_without_systemd_is_named_with_its_first_process(tmp_path: Path) -> None:
    said = ask(tmp_path, systemd=False)
    first = Path("/proc/1/comm").read_text().strip()
    assert f"systemd does not run there (its first process is {first})" in str(said)


def test_host_without_apt_is_refused(tmp_path: Path) -> None:
    assert "no apt-get; expected a Debian or Ubuntu" in str(
        ask(tmp_path, systemd=True, path=str(tmp_path))
    )


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (
            ["systemd sh", "kernel 6.8.0-31-generic", "container docker"],
            "it is a container (docker): name the machine",
        ),
        (
            ["systemd init", "kernel 5.15.167.4-microsoft-standard-WSL2"],
            "systemd=true into /etc/wsl.conf",
        ),
        (["systemd runit", "kernel 6.8.0"], "boot it with systemd"),
    ],
)
def test_advice_is_for_the_kind_of_machine(lines: list[str], advice: str) -> None:
    assert advice in str(MissingParts().process(lines))

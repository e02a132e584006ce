"""Differences between distributions, by their facts: not all can be booted here."""

import subprocess
from pathlib import Path

import pytest

from deploys import release, system
from deploys.hardware import Distribution, System


@pytest.mark.parametrize(
    ("distribution", "python"),
    [
        (("debian", "bookworm"), "python3"),
        (("debian", "trixie"), "python3"),
        (("ubuntu", "noble"), "python3"),
        (("ubuntu", "jammy"), "python3.11"),
        (("", ""), "python3"),
    ],
)
def test_python_is_new_enough_on_each(distribution: tuple[str, str], python: str) -> None:
    assert system.python_of(System(*distribution)) == python


def test_old_release_gets_its_second_python_and_environments_are_made_with_it() -> None:
    assert system.packages_for("python3") == system.PACKAGES
    assert set(system.packages_for("python3.11")) - set(system.PACKAGES) == {
        "python3.11",
        "python3.11-venv",
        "python3.11-dev",
    }
    script = release.environment_script(Path("/srv/release"), None, "python3.11")
    assert "python3.11 --version" in script
    assert "PYTHON=python3.11 scripts/environment $folder worker" in script
    assert "PYTHON" not in release.environment_script(Path("/srv/release"), None)


def test_distribution_says_who_it_is() -> None:
    fact = Distribution()
    said = subprocess.run(
        ["sh", "-c", fact.command()], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    assert fact.process(said.splitlines())[0] == "debian"
    assert fact.process(["ubuntu,noble,aarch64"]) == ("ubuntu", "noble", "aarch64")

"""Which tests a process of the run gets, and when: files, and the labs of real hosts.

Tests of one file share fixtures, and all files of one lab share its hosts, so each of these units
stays in one process. The longest units start first, so that no process is left with a long one
when the others have ended, and the waiting for hosts overlaps with the computing of other tests.
"""

from collections import Counter
from pathlib import Path, PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]
OTHER_LABS = {
    "test_lab_account.py": "own",
    "test_lab_debian13.py": "trixie",
    "test_lab_first_boot.py": "fresh",
    "test_lab_mesh.py": "bare",
    "test_lab_models.py": "own",
    "test_lab_sudo.py": "own",
    "test_lab_sudo_password.py": "own",
    "test_lab_tailscale.py": "tailscale",
    "test_lab_wheelhouse.py": "bare",
}
"""File -> the lab that its tests run in, if that is not `lab`."""
LONGEST_FIRST = (
    "lab",
    "own",
    "tests/e2e/test_demo.py",
    "tests/trainer/test_checkpoint.py",
    "tests/unit/test_node.py",
    "tests/e2e/test_secrets.py",
    "tests/swarm/test_daemon.py",
    "tests/e2e/test_registered.py",
    "tailscale",
    "tests/swarm/test_liars.py",
    "tests/chain/test_public_processes.py",
    "tests/pages/test_page.py",
)
"""The longest units. The others follow: with slow tests, then with the most tests first."""


class UnitScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hands units to the processes that are free, in the order of the collected tests."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(nodeid: str) -> str:
    """Return the name of the unit that a test belongs to: its lab, or its file."""
    file = nodeid.partition("::")[0]
    name = PurePosixPath(file).name
    return OTHER_LABS.get(name, "lab") if name.startswith("test_lab") else file


def sort(items: list[pytest.Item]) -> None:
    """Put the tests of each unit together, and the units in the order in which they start."""
    num_tests = Counter(unit_of(item.nodeid) for item in items)
    slow = {unit_of(item.nodeid) for item in items if item.get_closest_marker("slow")}

    def key(item: pytest.Item) -> tuple[int, bool, int, str]:
        unit = unit_of(item.nodeid)
        place = LONGEST_FIRST.index(unit) if unit in LONGEST_FIRST else len(LONGEST_FIRST)
        return place, unit not in slow, -num_tests[unit], unit

    items.sort(key=key)

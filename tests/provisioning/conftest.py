"""The labs as fixtures: real hosts, booted once for all tests of a lab.

Each lab, and the tests that use it, stay in one process of the run (tests/scheduling.py), so
several labs can run at once.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_hosts import COMMIT, FAKE_ANSWERS

from lab import machine
from lab.lab import Lab
from lab.lab_tailnet import LabTailnet, why_no_tailnet
from tests.scheduling import OTHER_LABS, unit_of

DEPLOY_SECONDS = 600
_LAB_OF_FIXTURE = {"lab": "lab", "own_lab": "own", "bare_lab": "bare", "tailnet": "tailscale"}
_SHARED_LABS = pytest.StashKey[ExitStack]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a file that OTHER_LABS does not name: two processes would boot its lab at once."""
    for item in items:
        for fixture in _LAB_OF_FIXTURE.keys() & set(getattr(item, "fixturenames", ())):
            wanted, named = _LAB_OF_FIXTURE[fixture], OTHER_LABS.get(item.path.name, "lab")
            if item.path.name.startswith("test_lab") and named != wanted:
                raise pytest.UsageError(
                    f"{item.path.name} uses the fixture {fixture} and is in the lab {named!r};"
                    f" expected {wanted!r}: name it in OTHER_LABS in tests/scheduling.py"
                )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Switch a shared lab off after its last test, since deployed workers train on."""
    try:
        return (yield)
    finally:
        if nextitem is None or unit_of(nextitem.nodeid) != unit_of(item.nodeid):
            item.session.stash.get(_SHARED_LABS, ExitStack()).close()


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Four hosts that answer over ssh, nothing deployed; skipped without a lab.

    With LAB_REQUIRED=1 the tests fail instead.
    """
    yield from shared(request.session, Lab("labtest"))


@pytest.fixture(scope="session")
def fleet(lab: Lab) -> Lab:
    """The lab, deployed: h1 is the coordinator, h2 and h3 train."""
    program = ("pyinfra", "-y", "inventory/lab.py", "deploy.py")
    done = lab.operator(*program, timeout=DEPLOY_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return lab


@pytest.fixture(scope="session")
def own_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Four hosts for files that need one or two each, and that use different ones."""
    yield from shared(request.session, Lab("labown"))


@pytest.fixture(scope="module")
def bare_lab() -> Iterator[Lab]:
    """Four hosts with nothing but Debian."""
    yield from booted(Lab("labbare", is_bare=True))


@pytest.fixture(scope="module")
def tailnet() -> Iterator[LabTailnet]:
    """Two bare hosts with tailscaled, logged out, and their operator in a tailnet.

    Skipped without the programs.
    """
    if reason := why_no_tailnet():
        pytest.skip(reason)
    for lab in booted(Lab("labtail", is_bare=True), num_hosts=2):
        tailnet = LabTailnet(lab)
        tailnet.start()
        for host in lab.hosts:
            tailnet.install(host)
        yield tailnet


def shared(session: pytest.Session, lab: Lab) -> Iterator[Lab]:
    """Boot the lab until the last test of its unit, or until the fixture ends."""
    with session.stash.setdefault(_SHARED_LABS, ExitStack()) as running:
        yield running.enter_context(contextmanager(booted)(lab))


def booted(lab: Lab, num_hosts: int = 4) -> Iterator[Lab]:
    """Boot the lab for the lifetime of the fixture that calls this."""
    if reason := machine.why_no_lab():
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {reason}")
        pytest.skip(reason)
    try:
        lab.up(num_hosts, goes_with_this_process=True)
        yield lab
    finally:
        lab.down()


@pytest.fixture
def write_inventory(tmp_path: Path) -> Any:
    def write(hub: dict[str, Any], *workers: dict[str, Any]) -> Path:
        common = {
            "fake_delay": 0.0,
            "fake_delay_jitter": 0.0,
            "fake_responses": FAKE_ANSWERS,
            "release_repository": "https://git.example.org/h.git",
            "release_ref": COMMIT,
            "secrets_dir": str(tmp_path / "secrets"),
        }
        named = [(f"@fake/gpu-{number}", common | data) for number, data in enumerate(workers)]
        file = tmp_path / "fleet.py"
        file.write_text(f"coordinators = [('@fake/hub', {common | hub!r})]\nworkers = {named!r}\n")
        return file

    return write

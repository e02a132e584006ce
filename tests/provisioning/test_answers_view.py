"""The answers of workers that a dashboard sees: the lines of its unit, and their commands."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from test_slots import cards
from test_units import parse
from test_validation import hub, plan_of

from deploys import answers_view, units
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry, HostPlan
from deploys.services import DASHBOARD_UNIT

STATE = "/var/lib/hivewright"


def both(**data: Any) -> HostPlan:
    """Return the plan of a coordinator that trains, too."""
    entry = HostEntry("hub", ("coordinators", "workers"), {"account_host": "192.0.2.10", **data})
    return validation.check([entry])["hub"]


def test_dashboard_is_shown_the_answers_of_its_hosts_slots_and_nothing_else_of_them() -> None:
    plan = both(slots=2, model_device="cpu").on(cards(0))
    shown = plan.services["dashboard"].dashboard.node_dirs
    assert [str(folder) for folder in shown] == [f"{STATE}/worker-0", f"{STATE}/worker-1"]
    text = answers_view.drop_in_text(shown)
    binds = [line for line in text.splitlines() if line.startswith("BindReadOnlyPaths=")]
    assert binds == [
        f"BindReadOnlyPaths=-/run/hivewright-answers/worker-{n}:{STATE}/worker-{n}/answers"
        for n in (0, 1)
    ]
    # After the walls, which hide the folders of all others.
    walls = parse(units.render(DASHBOARD_UNIT, 252, 900))["Service"]
    assert "%S/hivewright:ro" in walls["TemporaryFileSystem"]
    assert "worker" not in walls["BindReadOnlyPaths"]


def test_auto_slots_are_those_of_the_cards() -> None:
    plan = both(slots="auto").on(cards(3))
    assert len(plan.services["dashboard"].dashboard.node_dirs) == 3


def test_inventory_may_show_others_or_none() -> None:
    plan = both(slots=1, model_device="cpu", dashboard_node_dirs=[]).on(cards(0))
    assert plan.services["dashboard"].dashboard.node_dirs == ()
    assert answers_view.drop_in_text([]) == ""
    assert answers_view.drop_in_text([Path("/srv/node")]) == ""


def test_host_without_workers_has_no_drop_in() -> None:
    plan = plan_of("hub", hub()).on(cards(0))
    assert plan.services["dashboard"].dashboard.node_dirs == ()


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, for mounts that nobody else sees")
    with TemporaryDirectory(prefix="answers-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def run(folder: Path, before: str, after: str) -> str:
    """Run the unit's commands for `folder`/state/worker-0 among mounts of their own."""
    node, place = folder / "state/worker-0", folder / "run/worker-0"
    (folder / "state").mkdir()
    script = answers_view.show_script(node, place).replace("hivewright", "nobody")
    script = script.replace("-g nobody", "-g nogroup")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{before}\n({script})\n{after}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_answers_are_mounted_also_those_that_come_later(mounted: Path) -> None:
    said = run(mounted, "", "touch state/worker-0/answers/round-1 && ls run/worker-0")
    assert said.split() == ["round-1"]
    assert (mounted / "run").stat().st_mode & 0o777 == 0o700
    assert (mounted / "state/worker-0").stat().st_mode & 0o777 == 0o700


def test_link_that_a_worker_put_there_is_not_followed(mounted: Path) -> None:
    link = (
        "mkdir -p keeper state/worker-0; touch keeper/owner.key; ln -s ../../keeper"
        " state/worker-0/answers; chmod 755 keeper"
    )
    said = run(mounted, link, "ls run/worker-0")
    assert "is a link, not shown" in said
    assert "owner.key" not in said

"""The fleet on the dashboard: real endpoints, processes that do not answer, and the page."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.chain.conftest import Chain
from tests.pages.accessibility import barriers
from tests.pages.browser import Tab
from tests.pages.dashboards import showing, with_dashboard
from worker import metrics_endpoint, settings
from worker.dashboard.fleet_view import FleetView
from worker.telemetry.status import Finding, NodeStatus, RoundRecord

HOSTILE = "<b>evil</b>\x1b"


def status_of(folder: Path, name: str, round: int) -> NodeStatus:
    record = RoundRecord(round, 1e9, 0.5, 0, 0, (), 4, 2, {}, {}, 1, 1, None, external_share=0.25)
    node = NodeStatus(name, "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", round=round)
    node.state, node.reward_mean, node.last_round = "connected", 0.5, record
    node.warnings = (Finding("clock", "severe", "7 s"),)
    node.market_brier = {"bf": 0.25}
    node.write(folder)
    return node


@pytest.fixture
def targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    """Serve a node's figures, and name it and a process that does not answer in a file."""
    caplog.set_level("INFO", "worker.metrics_endpoint")
    folder = tmp_path / "worker-0"
    folder.mkdir()
    node = status_of(folder, "gpu-1", 12)
    assert node.last_round is not None
    of = settings.from_flat({"node_state_dir": str(folder), "metrics_port": 0}, "test")
    with ExitStack() as stack:
        stack.enter_context(metrics_endpoint.serving("worker", of))
        address = re.findall(r"http://([0-9.:]+)", caplog.text)[-1]
        groups = [
            {"targets": [address], "labels": {"host": HOSTILE, "service": "worker", "slot": "0"}},
            {"targets": ["127.0.0.1:1"], "labels": {"host": "hub", "service": "keeper"}},
        ]
        file = tmp_path / "targets.json"
        file.write_text(json.dumps(groups))
        yield file


def test_each_process_is_told_with_its_figures_or_its_reason(targets: Path) -> None:
    view = FleetView(targets)
    view.look()
    worker, keeper = view.content()["processes"]
    assert (worker["name"], worker["round"], worker["state"]) == ("gpu-1", 12, "connected")
    assert (worker["reward"], worker["external_share"]) == (0.5, 0.25)
    assert worker["warnings"] == ("clock (severe)",)
    assert worker["host"] == r"<b>evil</b>\x1b"
    assert (worker["error"], worker["version"]) == (None, "0.1.0")
    assert view.content()["brier"] == {"bf": 0.25}
    assert worker["as_of"] > 1e9
    assert (keeper["error"], keeper["round"], keeper["as_of"]) == ("Connection refused", None, None)


def test_process_that_stops_answering_keeps_its_figures(targets: Path) -> None:
    view = FleetView(targets)
    view.look()
    (first, *_) = view._processes.values()
    view._processes = {"127.0.0.1:1": first}
    groups = [{"targets": ["127.0.0.1:1"], "labels": {"host": "a", "service": "worker"}}]
    targets.write_text(json.dumps(groups))
    view.look()
    (worker,) = view.content()["processes"]
    assert (worker["round"], worker["error"]) == (12, "Connection refused")


@pytest.mark.parametrize("text", ["{", "[1]", '[{"targets": []}]', "null", '{"a": 1}'])
def test_targets_that_are_none_are_said(tmp_path: Path, text: str) -> None:
    view = FleetView(tmp_path / "targets.json")
    view.look()
    assert str(view.content()["error"]).startswith("no targets yet")
    (tmp_path / "targets.json").write_text(text)
    view.look()
    assert view.content()["error"] == "the targets can't be read"


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_page_shows_the_fleet_in_three_widths(
    chain: Chain, targets: Path, tmp_path: Path, tab: Tab
) -> None:
    chain.new_account("QmFirst")
    of = with_dashboard(
        chain.settings, tmp_path / "dashboard", show_fleet=True, targets_file=targets
    )
    with showing(of) as shown:
        for width in (400, 768, 1280):
            tab.page.set_viewport_size({"width": width, "height": 900})
            tab.page.goto(shown.url)
            tab.expect_count("#processes tr", 2)
            expect(tab.page.locator("#fleet-note")).to_have_text("2 processes, 1 without an answer")
            tab.expect_no_scrolling_sideways(width)
            for scheme in ("light", "dark"):
                tab.page.emulate_media(color_scheme=scheme)
                assert barriers(tab.page) == []
        assert "<b>evil</b>" in tab.text("#processes tr")
        assert "25 %" in tab.text("#processes tr")
        assert "bf 0.25" in tab.text("#by-brier")
        tab.page.screenshot(path=tmp_path / "fleet.png", full_page=True)


def test_fleet_is_not_shown_unless_the_owner_says_so(chain: Chain, tmp_path: Path) -> None:
    import requests

    with showing(with_dashboard(chain.settings, tmp_path / "dashboard")) as shown:
        assert requests.get(f"{shown.url}/api/fleet", timeout=10).json() is None

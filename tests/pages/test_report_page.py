"""The reports as a browser shows them: at three widths, light and dark, alone with the file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deploys.fleet.report import HostReport, Report, page
from tests.commands.test_training_report import node_with_history
from tests.pages.accessibility import barriers
from tests.pages.browser import Tab
from worker import settings
from worker.commands import training_report


def training(folder: Path) -> Path:
    (folder / "node").mkdir()
    node_with_history(folder / "node")
    flat = {"node_state_dir": str(folder / "node"), "model_name": "someone/" + "long-name-" * 12}
    file = folder / "report.html"
    of = settings.from_flat(flat, "test")
    training_report.write(file, "hivewright: gpu-1", [folder / "node"], of)
    return file


def rollout(folder: Path) -> Path:
    reason = "worker@0 ended with code 11: " + "it has fallen off the bus; " * 8
    hosts = {
        "gpu-1": HostReport("a" * 40, "b" * 40, "done", seconds=61.4, num_changes=7),
        "gpu-2": HostReport("a" * 40, "b" * 40, "lost", reason),
    }
    file = folder / "report.html"
    file.write_text(page(Report("inventory/mine.py", hosts, 0.0, 90.0, "incomplete")))
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("write", [training, rollout])
def test_report_is_whole_in_one_file_and_has_no_barriers(
    write: Callable[[Path], Path], scheme: str, tab: Tab, tmp_path: Path
) -> None:
    file = write(tmp_path)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    for width in (360, 800, 1280):
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.goto(file.as_uri())
        tab.expect_no_scrolling_sideways(width)
        tab.page.screenshot(path=tmp_path / f"{write.__name__}-{scheme}-{width}.png")
    assert set(asked) == {file.as_uri()}
    assert barriers(tab.page) == []
    dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    assert dark == (scheme == "dark")

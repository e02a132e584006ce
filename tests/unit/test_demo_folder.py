"""The demo's folder: its own, emptied for each run, and never somebody else's or one that is in use."""

import pytest

from worker import demo
from worker.errors import ResourceError, SettingsError


def test_folder_of_an_earlier_demo_is_emptied(tmp_path):
    with demo._fresh_folder(tmp_path / "out"):
        (tmp_path / "out/worker-0").mkdir()
        (tmp_path / "out/worker-0/swarm.pem").write_text("old")
        (tmp_path / "out/summary.json").write_text("{}")
    with demo._fresh_folder(tmp_path / "out"):
        assert {file.name for file in (tmp_path / "out").iterdir()} == {demo.MARKER, "lock"}


def test_second_demo_in_a_folder_is_refused_and_touches_nothing(tmp_path):
    with demo._fresh_folder(tmp_path):
        (tmp_path / "ledger.db").write_text("1")
        with pytest.raises(ResourceError, match=r"\(--output\): in use by process \d+; stop that one"):
            demo._fresh_folder(tmp_path)
        assert (tmp_path / "ledger.db").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_place_that_is_no_folder_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="expected a folder that can be made"):
        demo._fresh_folder(tmp_path / place)

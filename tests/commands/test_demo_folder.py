"""The demo's folder is emptied for each run, and a foreign or locked one is refused."""

import argparse

import pytest

from worker.commands import demo
from worker.errors import ResourceError, SettingsError


def test_folder_of_an_earlier_demo_is_emptied_and_that_is_reported(tmp_path, capsys):
    with demo._fresh_folder(tmp_path / "out"):
        (tmp_path / "out/worker-0").mkdir()
        (tmp_path / "out/worker-0/swarm.pem").write_text("old")
        (tmp_path / "out/summary.json").write_text("{}")
    assert capsys.readouterr().out == ""
    with demo._fresh_folder(tmp_path / "out"):
        assert {file.name for file in (tmp_path / "out").iterdir()} == {demo.MARKER, "lock"}
    left = f"what an earlier demo left in {tmp_path / 'out'} is removed (2 files and folders)"
    assert capsys.readouterr().out == f"starting again: {left}\n"


def test_more_workers_than_a_machine_can_have_are_refused(tmp_path):
    options = argparse.Namespace(output=tmp_path / "out", workers=1_000_000, rounds=1, seed=0)
    with pytest.raises(SettingsError, match="--workers: got 1000000; expected at most 64"):
        demo.run(options)
    assert not (tmp_path / "out").exists()


def test_second_demo_in_a_folder_is_refused_and_touches_nothing(tmp_path):
    with demo._fresh_folder(tmp_path):
        (tmp_path / "ledger.db").write_text("1")
        with pytest.raises(
            ResourceError, match=r"\(--output\): in use by process \d+; stop that one"
        ):
            demo._fresh_folder(tmp_path)
        assert (tmp_path / "ledger.db").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_place_that_is_no_folder_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="expected a folder that can be made"):
        demo._fresh_folder(tmp_path / place)

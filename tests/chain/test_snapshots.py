"""The embedded chain's state on the disk: only complete dumps become the snapshot."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.chain.embedded import snapshots as module
from worker.chain.embedded.snapshots import Snapshots
from worker.errors import ResourceError

WHOLE = '{"block": {"number": 7}}'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.005)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_complete_dump_becomes_the_snapshot_while_the_chain_runs(tmp_path: Path) -> None:
    file = tmp_path / "chain/state.json"
    snapshots = Snapshots(file)
    snapshots.start()
    snapshots.draft.write_text(WHOLE)
    wait_for(lambda: file.exists() and file.read_text() == WHOLE)
    later = WHOLE.replace("7", "1234")
    snapshots.draft.write_text(later)
    wait_for(lambda: file.read_text() == later)
    snapshots.stop()
    assert (file.read_text(), snapshots.draft.exists()) == (later, False)


@pytest.mark.parametrize("cut", [1, 2, len(WHOLE) - 1])
def test_truncated_dump_never_replaces_the_snapshot(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "state.json"
    file.write_text(WHOLE)
    snapshots = Snapshots(file)
    snapshots.start()
    snapshots.draft.write_text(WHOLE.replace("7", "8")[:-cut])
    time.sleep(0.05)
    snapshots.stop()
    assert file.read_text() == WHOLE
    assert "the last dump is truncated; keeping the snapshot before it" in caplog.text


def test_dump_that_changes_while_it_is_read_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(tmp_path / "state.json")
    snapshots.draft.write_text(WHOLE)
    versions = iter([(1, 1), (2, 2), (2, 2), (2, 2)])
    monkeypatch.setattr(module, "_version", lambda file: next(versions))
    assert not snapshots._take()
    assert not (tmp_path / "state.json").exists()
    assert snapshots._take()


def test_full_disk_is_logged_once_and_the_next_dump_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_full, tries = threading.Event(), []
    write = module.write_whole

    def write_if_there_is_room(path: Path, content: str) -> None:
        tries.append(path)
        if is_full.is_set():
            raise ResourceError(f"{path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(module, "write_whole", write_if_there_is_room)
    monkeypatch.setattr(module, "_WORRY_SECONDS", 0.0)
    is_full.set()
    file = tmp_path / "state.json"
    snapshots = Snapshots(file)
    snapshots.start()
    snapshots.draft.write_text(WHOLE)
    wait_for(lambda: len(tries) > 3)
    is_full.clear()
    wait_for(file.exists)
    snapshots.stop()
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert sum("No space left on device" in error for error in errors) == 1


def test_draft_that_can_t_be_read_is_an_error(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "state.json")
    snapshots.draft.mkdir()
    with pytest.raises(ResourceError, match="can't be read: Is a directory"):
        snapshots._take()

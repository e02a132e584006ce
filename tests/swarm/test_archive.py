"""Our signed groups on the disk: found by digest, kept for a number of rounds."""

import threading
from pathlib import Path

import pytest

from worker.swarm.exchange.archive import Archive
from worker.swarm.protocol.messages import groups_digest


def test_groups_are_found_by_their_digest_also_after_a_restart(tmp_path: Path) -> None:
    digest = Archive(tmp_path / "groups", 3).put(7, b"signed")
    assert digest == groups_digest(b"signed")
    assert Archive(tmp_path / "groups", 3).find(digest) == b"signed"
    assert Archive(tmp_path / "groups", 3).find(groups_digest(b"others")) is None


def test_oldest_rounds_are_removed_by_their_number(tmp_path: Path) -> None:
    archive = Archive(tmp_path, 2)
    digests = {number: archive.put(number, b"%d" % number) for number in (9, 10, 11)}
    assert archive.find(digests[9]) is None  # "9" sorts after "10" as text
    assert [archive.find(digests[number]) for number in (10, 11)] == [b"10", b"11"]


def test_round_that_was_run_again_has_both_results(tmp_path: Path) -> None:
    archive = Archive(tmp_path, 1)
    first, second = archive.put(7, b"first"), archive.put(7, b"second")
    assert (archive.find(first), archive.find(second)) == (b"first", b"second")
    archive.put(8, b"next")
    assert (archive.find(first), archive.find(second)) == (None, None)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes-x.groups").write_text("mine")
    archive = Archive(tmp_path, 1)
    archive.put(1, b"a")
    archive.put(2, b"b")
    assert (tmp_path / "notes-x.groups").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_groups_are_looked_up_while_rounds_end(tmp_path: Path) -> None:
    """An auditor asks while the round loop removes the oldest files."""
    archive, failures = Archive(tmp_path, 2), []
    is_over = threading.Event()
    digest = archive.put(0, b"0")

    def look() -> None:
        while not is_over.is_set():
            try:
                for file in list(tmp_path.iterdir()):
                    found = archive.find(file.stem.partition("-")[2])
                    assert found is None or groups_digest(found) in file.stem
            except (OSError, AssertionError) as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, 60):
        archive.put(number, b"%d" % number)
    is_over.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert archive.find(digest) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_file_that_is_removed_while_it_is_opened_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(tmp_path, 2)
    digest = archive.put(1, b"a")
    read = Path.read_bytes

    def remove_first(file: Path) -> bytes:
        file.unlink()
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", remove_first)
    assert archive.find(digest) is None


@pytest.mark.parametrize("digest", ["", "-", "*", "../../etc/passwd", "x" * 300])
def test_digest_that_is_none_finds_nothing(tmp_path: Path, digest: str) -> None:
    archive = Archive(tmp_path, 2)
    archive.put(1, b"a")
    assert archive.find(digest) is None

"""Backups: what is in them, who can read them, and that nobody else can."""

import io
import sqlite3
import tarfile
from pathlib import Path

import pytest
from nacl.public import PrivateKey

from deploys import sealing
from deploys.fleet import archive, upkeep
from worker.errors import SettingsError, WorkerError

PASSPHRASE = "correct horse"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A host's state folder: a worker whose ledger is open in WAL mode, and a keeper."""
    folder = tmp_path / "state"
    (folder / "worker-0/checkpoints").mkdir(parents=True)
    (folder / "keeper").mkdir()
    (folder / "worker-0/swarm.pem").write_bytes(b"KEY")
    (folder / "worker-0/checkpoints/weights").write_bytes(b"W" * 1000)
    (folder / "worker-0/wallet").mkdir()
    (folder / "worker-0/wallet/wallet.json").write_text("{}")
    (folder / "worker-0/wallet/lock").write_text("7")
    (folder / "keeper/owner.key").write_bytes(b"OWNER")
    (folder / "keeper/lock").write_bytes(b"7")
    (folder / "retired/worker-3-20260101T000000").mkdir(parents=True)
    (folder / "retired/worker-3-20260101T000000/swarm.pem").write_bytes(b"OLD KEY")
    return folder


def test_backup_holds_what_can_not_be_made_again_and_nothing_else(state: Path) -> None:
    database = sqlite3.connect(state / "worker-0/ledger.db")
    database.execute("pragma journal_mode=wal")
    database.execute("create table rewards (round)")
    database.execute("insert into rewards values (7)")
    database.commit()
    with tarfile.open(fileobj=io.BytesIO(sealing.pack(state))) as tar:
        assert sorted(tar.getnames()) == [
            "keeper/owner.key", "retired/worker-3-20260101T000000/swarm.pem", "worker-0/ledger.db",
            "worker-0/swarm.pem", "worker-0/wallet/wallet.json",
        ]  # fmt: skip
        ledger = tar.extractfile("worker-0/ledger.db")
        assert ledger is not None
        copy = state / "copy.db"
        copy.write_bytes(ledger.read())
    database.close()
    restored = sqlite3.connect(copy)
    assert restored.execute("select round from rewards").fetchall() == [(7,)]
    restored.close()


def test_what_is_sealed_for_one_reader_tells_others_nothing(state: Path) -> None:
    key = PrivateKey.generate()
    sealed = sealing.seal(sealing.pack(state), f"{sealing.KEY_PREFIX}{bytes(key.public_key).hex()}")
    assert upkeep.opened("gpu-1", sealed, key) == sealing.pack(state)
    with pytest.raises(WorkerError, match="can't be opened"):
        upkeep.opened("gpu-1", sealed, PrivateKey.generate())


def test_file_of_a_service_that_is_never_whole_is_no_backup(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing.time, "sleep", lambda _: None)
    (state / "keeper/deployment.json").write_text('{"contract": ')
    with pytest.raises(ValueError, match=r"deployment\.json: no JSON, 5 times"):
        sealing.pack(state)


def test_archive_reads_back_with_its_passphrase_only(tmp_path: Path) -> None:
    file, hosts = tmp_path / "fleet.backup", {"gpu-1": b"tar one", "hub": b"tar two" * 100}
    archive.write(file, hosts, PASSPHRASE)
    assert archive.read(file, PASSPHRASE) == hosts
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"tar one" not in file.read_bytes()
    with pytest.raises(SettingsError, match="another passphrase"):
        archive.read(file, "incorrect horse")


def test_damaged_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fleet.backup"
    archive.write(file, {"gpu-1": b"tar"}, PASSPHRASE)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"gpu-1", b"gpu-2")):
        file.write_bytes(damaged)
        with pytest.raises(SettingsError, match="damaged"):
            archive.read(file, PASSPHRASE)
    file.write_bytes(b"PK")
    with pytest.raises(SettingsError, match="no backup"):
        archive.read(file, PASSPHRASE)


def test_archive_is_never_overwritten_and_wants_a_real_passphrase(tmp_path: Path) -> None:
    file = tmp_path / "fleet.backup"
    with pytest.raises(SettingsError, match="expected at least 8"):
        archive.write(file, {"gpu-1": b"tar"}, "short")
    assert not file.exists()
    archive.write(file, {"gpu-1": b"tar"}, PASSPHRASE)
    with pytest.raises(SettingsError, match="is there already"):
        archive.write(file, {"gpu-1": b"other"}, PASSPHRASE)
    assert archive.read(file, PASSPHRASE) == {"gpu-1": b"tar"}


def test_place_where_no_archive_can_be_is_refused_before_any_host_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in (
        ("nowhere/x.backup", "no folder that can be written to"),
        ("file/x.backup", "no folder that can be written to"),
        ("file", "is there already"),
    ):
        with pytest.raises(SettingsError, match=reason):
            archive.require_new(tmp_path / place)
    with pytest.raises(SettingsError, match="File name too long; expected a place for a new file"):
        archive.write(tmp_path / ("x" * 300), {"gpu-1": b"tar"}, PASSPHRASE)
    archive.require_new(tmp_path / "new.backup")


@pytest.mark.usefixtures("usual_recursion_limit")
def test_archive_whose_header_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.backup").write_bytes(archive.MAGIC + b"[" * 100_000 + b"\nx")
    with pytest.raises(SettingsError, match="header is damaged"):
        archive.read(tmp_path / "x.backup", PASSPHRASE)

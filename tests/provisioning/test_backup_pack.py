"""Backups: their content, and who can read them."""

import hashlib
import io
import json
import sqlite3
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from nacl.public import PrivateKey

from deploys import backup_pack, backup_send
from deploys.fleet import backup_command, backup_file, commands, restore_command
from worker.errors import SettingsError, WorkerError

PASSPHRASE = "correct horse"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Make a host's state folder: a worker whose ledger is open in WAL mode, and a keeper."""
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
    (folder / "chain").mkdir()
    (folder / "chain/state.json").write_text("{}")
    for draft in ("state.json.draft", ".state.json.x7", "deployment.json.new"):
        (folder / "chain" / draft).write_text("half of i")
    (folder / "retired/worker-3-20260101T000000").mkdir(parents=True)
    (folder / "retired/worker-3-20260101T000000/swarm.pem").write_bytes(b"OLD KEY")
    return folder


def test_backup_holds_what_can_not_be_made_again_and_nothing_else(state: Path) -> None:
    database = sqlite3.connect(state / "worker-0/ledger.db")
    database.execute("pragma journal_mode=wal")
    database.execute("create table rewards (round)")
    database.execute("insert into rewards values (7)")
    database.commit()
    with tarfile.open(fileobj=io.BytesIO(backup_pack.pack(state))) as tar:
        assert sorted(tar.getnames()) == [
            "chain/state.json",
            "keeper/owner.key",
            "retired/worker-3-20260101T000000/swarm.pem",
            "worker-0/ledger.db",
            "worker-0/swarm.pem",
            "worker-0/wallet/wallet.json",
        ]
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
    sealed = backup_pack.seal(
        backup_pack.pack(state), f"{backup_pack.KEY_PREFIX}{bytes(key.public_key).hex()}"
    )
    assert commands.opened("gpu-1", sealed, key) == backup_pack.pack(state)
    with pytest.raises(WorkerError, match="can't be opened"):
        commands.opened("gpu-1", sealed, PrivateKey.generate())


def sealed_part(folder: Path, state: Path, key: PrivateKey) -> Path:
    file = folder / "part"
    with file.open("wb") as out:
        sealer = backup_pack.Sealer(out, f"{backup_pack.KEY_PREFIX}{bytes(key.public_key).hex()}")
        backup_pack.write_tar(state, sealer)  # type: ignore[arg-type]
        sealer.finish()
    return file


def test_host_seals_in_chunks_what_only_this_backup_can_open(state: Path, tmp_path: Path) -> None:
    (state / "chain/state.json").write_bytes(b"{}" + b" " * (backup_pack.MAX_IN_MEMORY + 5 * 2**20))
    key = PrivateKey.generate()
    file = sealed_part(tmp_path, state, key)
    part = backup_command._Part("hub", file, key)
    whole = b"".join(part.pieces())
    assert len(whole) == part.size
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert tar.getnames() == part.names
        assert tar.getmember("chain/state.json").size == backup_pack.MAX_IN_MEMORY + 5 * 2**20 + 2
    assert (
        "chain (1 files), keeper (1 files), retired/worker-3-20260101T000000 (1 files)"
        in part.contents()
    )
    with pytest.raises(WorkerError, match="hub: what it sealed can't be opened"):
        list(backup_command._Part("hub", file, PrivateKey.generate()).pieces())
    cut = file.read_bytes()
    for damaged in (cut[:-1], cut[: -(2**20)], cut[:-20] + b"x" * 20):
        file.write_bytes(damaged)
        with pytest.raises(WorkerError, match="hub: what it sealed can't be opened"):
            list(backup_command._Part("hub", file, key).pieces())


def test_host_with_an_earlier_release_is_backed_up_too(state: Path, tmp_path: Path) -> None:
    key = PrivateKey.generate()
    tar = backup_pack.pack(state)
    (tmp_path / "part").write_text(
        backup_pack.seal(tar, f"{backup_pack.KEY_PREFIX}{bytes(key.public_key).hex()}")
    )
    part = backup_command._Part("hub", tmp_path / "part", key)
    assert (part.size, b"".join(part.pieces())) == (len(tar), tar)
    assert "worker-0/swarm.pem" in part.names


def write(file: Path, hosts: dict[str, bytes], passphrase: str) -> None:
    backup_file.write(
        file, {name: backup_file.Tar(len(tar), [tar]) for name, tar in hosts.items()}, passphrase
    )


def read(file: Path, passphrase: str) -> dict[str, bytes]:
    hosts: dict[str, bytes] = {}
    for name, piece in backup_file.pieces(file, passphrase):
        hosts[name] = hosts.get(name, b"") + piece
    return hosts


def test_archive_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Write a backup of version 1: one chunk, a tar of tars."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo("gpu-1")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"tar"))
    salt, nonce = b"s" * 16, b"n" * 12
    said = {"hosts": ["gpu-1"], "salt": salt.hex(), "nonce": nonce.hex(), **backup_file.SCRYPT}
    head = backup_file.MAGIC_1 + json.dumps(said).encode() + b"\n"
    sealed = backup_file._cipher(PASSPHRASE, salt).encrypt(nonce, stream.getvalue(), head)
    (tmp_path / "old.backup").write_bytes(head + sealed)
    assert read(tmp_path / "old.backup", PASSPHRASE) == {"gpu-1": b"tar"}


@pytest.mark.parametrize(
    "size",
    [0, backup_file.CHUNK - 1, backup_file.CHUNK, 2 * backup_file.CHUNK, 2 * backup_file.CHUNK + 1],
)
def test_archive_of_any_size_reads_back_and_tells_if_a_chunk_is_missing(
    size: int, tmp_path: Path
) -> None:
    file, tar = tmp_path / "fleet.backup", bytes(size)
    write(file, {"hub": tar, "gpu-1": b"x"}, PASSPHRASE)
    assert read(file, PASSPHRASE) == {"hub": tar, "gpu-1": b"x"}
    whole = file.read_bytes()
    head = whole.index(b"\n", len(backup_file.MAGIC)) + 1
    first = head + backup_file.CHUNK + 16
    for damaged in (
        whole[:-1],
        whole[:first] if first < len(whole) else whole[: head + 5],
        whole + whole[-100:],
    ):
        file.write_bytes(damaged)
        with pytest.raises(SettingsError, match="damaged"):
            read(file, PASSPHRASE)


def test_file_of_a_service_that_is_never_whole_is_no_backup(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_pack.time, "sleep", lambda _: None)
    (state / "keeper/deployment.json").write_text('{"contract": ')
    with pytest.raises(ValueError, match=r"deployment\.json: no JSON, 5 times"):
        backup_pack.pack(state)


def test_archive_reads_back_with_its_passphrase_only(tmp_path: Path) -> None:
    file, hosts = tmp_path / "fleet.backup", {"gpu-1": b"tar one", "hub": b"tar two" * 100}
    write(file, hosts, PASSPHRASE)
    assert read(file, PASSPHRASE) == hosts
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"tar one" not in file.read_bytes()
    with pytest.raises(SettingsError, match="another passphrase"):
        read(file, "incorrect horse")


def test_damaged_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fleet.backup"
    write(file, {"gpu-1": b"tar"}, PASSPHRASE)
    whole = file.read_bytes()
    for damaged in (
        whole[:-1],
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole.replace(b"gpu-1", b"gpu-2"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(SettingsError, match="damaged"):
            read(file, PASSPHRASE)
    file.write_bytes(b"PK")
    with pytest.raises(SettingsError, match="no backup"):
        read(file, PASSPHRASE)


def test_archive_is_never_overwritten_and_wants_a_real_passphrase(tmp_path: Path) -> None:
    file = tmp_path / "fleet.backup"
    with pytest.raises(SettingsError, match="expected at least 8"):
        write(file, {"gpu-1": b"tar"}, "short")
    assert not file.exists()
    write(file, {"gpu-1": b"tar"}, PASSPHRASE)
    with pytest.raises(SettingsError, match="is there already"):
        write(file, {"gpu-1": b"other"}, PASSPHRASE)
    assert read(file, PASSPHRASE) == {"gpu-1": b"tar"}


def test_place_where_no_archive_can_be_is_refused_before_any_host_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in (
        ("nowhere/x.backup", "not a folder that can be written to"),
        ("file/x.backup", "not a folder that can be written to"),
        ("file", "is there already"),
    ):
        with pytest.raises(SettingsError, match=reason):
            backup_file.require_new(tmp_path / place)
    with pytest.raises(SettingsError, match="File name too long; expected a place for a new file"):
        write(tmp_path / ("x" * 300), {"gpu-1": b"tar"}, PASSPHRASE)
    backup_file.require_new(tmp_path / "new.backup")


@pytest.mark.usefixtures("usual_recursion_limit")
def test_archive_whose_header_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.backup").write_bytes(backup_file.MAGIC + b"[" * 100_000 + b"\nx")
    with pytest.raises(SettingsError, match="header is damaged"):
        read(tmp_path / "x.backup", PASSPHRASE)


def test_part_of_a_large_backup_is_sealed_and_sent_with_little_memory(tmp_path: Path) -> None:
    file, large, own = tmp_path / "x.backup", bytes(24 << 20), b"own" * (12 << 20)
    write(file, {"first": large, "empty": b"", "gpu-1": own, "last": large}, PASSPHRASE)
    key, part = PrivateKey.generate(), tmp_path / "part"
    digest, sizes = hashlib.sha256(), []
    tracemalloc.start()
    try:
        restore_command._seal_part(file, PASSPHRASE, "gpu-1", part, key)
        with part.open("rb") as stream:
            for piece in backup_send.pieces_of(backup_pack.opened(stream, key)):
                digest.update(piece)
                sizes.append(len(piece))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest.digest() == hashlib.sha256(own).digest()
    assert sum(sizes) == len(own)
    assert most < 4 * backup_send.PIECE
    assert b"ownown" not in part.read_bytes()

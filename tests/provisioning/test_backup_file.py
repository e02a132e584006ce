"""The file of a backup: damaged, foreign and full disks; what is cut off is never a backup."""

import json
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys.fleet import backup_file
from deploys.fleet.backup_file import MAGIC, MAGIC_1, Tar
from worker.errors import SettingsError, WorkerError

PASSPHRASE = "correct horse"
DAMAGED_HEADER = "its header is damaged; take another copy of it"


@pytest.fixture(autouse=True)
def _cheap_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive keys with little work, and cut the content into small chunks."""
    monkeypatch.setitem(backup_file.SCRYPT, "n", 2)
    monkeypatch.setattr(backup_file, "CHUNK", 64)


def write(file: Path, **hosts: bytes) -> None:
    tars = {name: Tar(len(content), [content]) for name, content in hosts.items()}
    backup_file.write(file, tars, PASSPHRASE)


def read(file: Path, passphrase: str = PASSPHRASE) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, piece in backup_file.pieces(file, passphrase):
        found[name] = found.get(name, b"") + piece
    return found


def refusal(file: Path) -> str:
    with pytest.raises(SettingsError) as refused:
        read(file)
    return str(refused.value)


@contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    """Let no file of this process become larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(
    tars=st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.lists(st.binary(max_size=150), max_size=3),
        max_size=3,
    )
)
def test_hosts_come_back_with_their_content(
    tars: dict[str, list[bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("backups") / "file"
    sizes = {name: sum(map(len, pieces)) for name, pieces in tars.items()}
    backup_file.write(
        file, {name: Tar(sizes[name], pieces) for name, pieces in tars.items()}, PASSPHRASE
    )
    assert read(file) == {name: b"".join(pieces) for name, pieces in tars.items()}


@hypothesis_settings(max_examples=40, deadline=None, database=None)
@given(data=st.data())
def test_no_byte_can_be_changed_removed_or_added(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("backups") / "file"
    write(file, hub=bytes(200), gpu=b"x")
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["changed", "cut", "removed", "added"]))
    other = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    file.write_bytes(
        {
            "changed": whole[:place] + other + whole[place + 1 :],
            "cut": whole[:place],
            "removed": whole[:place] + whole[place + 1 :],
            "added": whole[: place + 1] + other + whole[place + 1 :],
        }[kind]
    )
    message = refusal(file)
    assert message.startswith(f"{file}: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(nonce=""),
        lambda header: header.update(nonce="00" * 6),
        lambda header: header.update(nonce="00" * 12),
        lambda header: header.update(nonce="xyz"),
        lambda header: header.update(nonce=7),
        lambda header: header.update(salt=""),
        lambda header: header.update(salt=None),
        lambda header: header.update(n=2**30),
        lambda header: header.update(r="8"),
        lambda header: header.pop("hosts"),
        lambda header: header.pop("salt"),
    ],
)
def test_header_of_another_form_is_damaged(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    write(tmp_path / "file", hub=b"x")
    _, line, rest = (tmp_path / "file").read_bytes().split(b"\n", 2)
    header = json.loads(line)
    change(header)
    for magic in (MAGIC, MAGIC_1):
        if magic == MAGIC_1 and len(str(header.get("nonce"))) == 24:
            continue  # the length of its own
        (tmp_path / "file").write_bytes(magic + json.dumps(header).encode() + b"\n" + rest)
        assert refusal(tmp_path / "file") == f"{tmp_path / 'file'}: {DAMAGED_HEADER}"


@pytest.mark.parametrize("line", [b"", b"[]\n", b"null\n", b"\xff\xfe\n", b"[" * 9000 + b"\n"])
def test_header_that_is_no_json_object_is_damaged(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(MAGIC + line)
    assert refusal(tmp_path / "file").endswith(DAMAGED_HEADER)


@pytest.mark.parametrize("content", [b"", b"hivewright-backup 3\n{}", b"\x1f\x8b" * 50, MAGIC[:-1]])
def test_file_that_is_no_backup_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert refusal(tmp_path / "file") == (
        f"{tmp_path / 'file'}: no backup of this version; expected a file that `hivewright fleet"
        " backup` wrote"
    )


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "No such file or directory"), ("", "Is a directory")]
)
def test_file_that_cannot_be_read_is_named(name: str, reason: str, tmp_path: Path) -> None:
    assert f"{tmp_path / name}: {reason}; expected a file that" in refusal(tmp_path / name)


@pytest.mark.parametrize(("size", "pieces"), [(5, [b"1234"]), (3, [b"12", b"34"]), (1, [])])
def test_host_whose_tar_has_another_size_than_it_said_is_no_backup(
    size: int, pieces: Iterable[bytes], tmp_path: Path
) -> None:
    total = sum(map(len, pieces))
    with pytest.raises(WorkerError) as failed:
        backup_file.write(tmp_path / "file", {"hub": Tar(size, pieces)}, PASSPHRASE)
    assert str(failed.value) == f"hub: {total} bytes came; expected {size}; nothing was written"
    assert not (tmp_path / "file").exists()


def test_full_disk_leaves_no_half_backup(tmp_path: Path) -> None:
    with limited_files(4096), pytest.raises(SettingsError) as refused:
        write(tmp_path / "file", hub=bytes(100_000))
    assert str(refused.value) == (
        f"{tmp_path / 'file'}: File too large; expected a place for a new file, nothing was written"
    )
    assert list(tmp_path.iterdir()) == []


def test_host_that_fails_in_the_middle_leaves_no_half_backup(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(1000)
        raise WorkerError("hub: what it sealed can't be opened")

    with pytest.raises(WorkerError, match="can't be opened"):
        backup_file.write(tmp_path / "file", {"hub": Tar(2000, failing())}, PASSPHRASE)
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match="is there already; expected a name for a new file"):
        write(tmp_path / "file", hub=b"x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a" * 300, "File name too long; expected a place for a new file"),
        (".", "is there already; expected a name for a new file"),
        ("nowhere/file", "is not a folder that can be written to; expected an existing one"),
        ("file/backup", "is not a folder that can be written to; expected an existing one"),
    ],
)
def test_place_where_no_file_can_be_made_is_refused_before_hosts_are_asked(
    name: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError) as refused:
        backup_file.require_new(tmp_path / name)
    assert str(refused.value).endswith(reason)


def test_new_file_in_an_existing_folder_is_right(tmp_path: Path) -> None:
    backup_file.require_new(tmp_path / "file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("length", "is_right"), [(0, False), (7, False), (8, True), (1000, True)])
def test_passphrase_has_eight_characters_or_more(length: int, is_right: bool) -> None:
    if is_right:
        backup_file.require_passphrase("x" * length)
        return
    with pytest.raises(SettingsError) as refused:
        backup_file.require_passphrase("x" * length)
    assert str(refused.value) == f"passphrase: {length} characters; expected at least 8"


def test_file_is_only_for_its_owner(tmp_path: Path) -> None:
    write(tmp_path / "file", hub=b"secret content")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert b"secret content" not in (tmp_path / "file").read_bytes()
    with pytest.raises(SettingsError, match="another passphrase, or the file is damaged"):
        read(tmp_path / "file", "incorrect horse")

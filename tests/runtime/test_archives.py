"""Archives of others: files and folders below one folder, and nothing else."""

import io
import tarfile
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import largest_file
from worker.runtime.archives import unpack


def archive(*members, mode="r"):
    """Return an open archive of (name, content) pairs and whole members."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    made.seek(0)
    return tarfile.open(fileobj=made, mode=mode)


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def link(name, target):
    return member(name, tarfile.SYMTYPE, target)


@pytest.mark.parametrize("mode", ["r", "r|"])
def test_files_and_folders_are_written(tmp_path, mode):
    with archive(("a/b.txt", b"text"), member("empty", tarfile.DIRTYPE), mode=mode) as tar:
        unpack(tar, tmp_path)
    assert (tmp_path / "a/b.txt").read_bytes() == b"text"
    assert (tmp_path / "empty").is_dir()


def test_only_the_named_members_are_written(tmp_path):
    with archive(("a", b"1"), ("b", b"2")) as tar:
        unpack(tar, tmp_path, [tar.getmember("b")])
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "hostile",
    [
        ("../out", b"x"),
        ("/out", b"x"),
        ("a/../../out", b"x"),
        link("out", "/etc/passwd"),
        member("out", tarfile.LNKTYPE, "/etc/passwd"),
        member("out", tarfile.CHRTYPE),
        member("out", tarfile.BLKTYPE),
        member("out", tarfile.FIFOTYPE),
    ],
)
def test_nothing_leaves_the_folder(tmp_path, hostile):
    inside = tmp_path / "inside"
    inside.mkdir()
    with archive(hostile) as tar, pytest.raises(tarfile.TarError, match="expected a"):
        unpack(tar, inside)
    assert list(tmp_path.rglob("*")) == [inside]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a", b"x"), ("a/b", b"x")], "File exists"),
        ([("a/b", b"x"), ("a", b"x")], "Is a directory"),
        ([("a", b"x"), ("a/b/c", b"x")], "Not a directory"),
        ([("a", b"x"), member("a", tarfile.DIRTYPE)], "File exists"),
        ([(".", b"x")], "Is a directory"),
    ],
)
def test_name_that_is_a_file_and_a_folder_is_refused(tmp_path, members, reason):
    with archive(*members) as tar, pytest.raises(tarfile.TarError, match=f"{reason}; expected"):
        unpack(tar, tmp_path)


def test_name_with_a_zero_byte_is_refused(tmp_path):
    info = tarfile.TarInfo("a")
    with archive(("a", b"x")) as tar:
        info = tar.getmember("a")
        info.name = "a\0b"
        with pytest.raises(tarfile.TarError, match="expected a name within"):
            unpack(tar, tmp_path, [info])


@pytest.mark.parametrize("mode", ["r", "r|"])
@pytest.mark.parametrize("kept", [513, 700, 1023])
def test_truncated_archive_is_refused(tmp_path, mode, kept):
    with archive(("a", b"x" * 600), ("b", b"y")) as tar:
        content = tar.fileobj.getvalue()[:kept]
    with (
        tarfile.open(fileobj=io.BytesIO(content), mode=mode) as tar,
        pytest.raises(tarfile.TarError),
    ):
        unpack(tar, tmp_path)


def test_full_disk_is_no_mistake_of_the_archive(tmp_path):
    with (
        archive(("a", b"x" * 5000)) as tar,
        largest_file(4096),
        pytest.raises(OSError, match="File too large") as full,
    ):
        unpack(tar, tmp_path)
    assert not isinstance(full.value, tarfile.TarError)


NAMES = st.lists(st.sampled_from(["a", "b", ".", "..", "", "a b"]), min_size=1, max_size=4)


@given(st.lists(NAMES.map("/".join), max_size=5))
def test_any_names_stay_inside_or_are_refused(tmp_path_factory, names):
    outside = tmp_path_factory.mktemp("any")
    inside = outside / "inside"
    inside.mkdir()
    with archive(*((name, b"x") for name in names)) as tar:
        try:
            unpack(tar, inside)
        except tarfile.TarError:
            pass
        else:
            files = {inside / PurePosixPath(name) for name in names}
            assert {file for file in inside.rglob("*") if file.is_file()} == files
    assert list(outside.iterdir()) == [inside]

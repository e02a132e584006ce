import io
import tarfile

import pytest

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


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize("mode", ["r", "r|"])
def test_files_and_folders_are_written(tmp_path, mode):
    folder = tarfile.TarInfo("empty")
    folder.type = tarfile.DIRTYPE
    with archive(("a/b.txt", b"text"), folder, mode=mode) as tar:
        unpack(tar, tmp_path)
    assert (tmp_path / "a/b.txt").read_bytes() == b"text"
    assert (tmp_path / "empty").is_dir()


def test_only_the_named_members_are_written(tmp_path):
    with archive(("a", b"1"), ("b", b"2")) as tar:
        unpack(tar, tmp_path, [tar.getmember("b")])
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "member", [("../out", b"x"), ("/out", b"x"), ("a/../../out", b"x"), link("out", "/etc/passwd")]
)
def test_nothing_leaves_the_folder(tmp_path, member):
    inside = tmp_path / "inside"
    inside.mkdir()
    with archive(member) as tar, pytest.raises(tarfile.TarError, match="expected a"):
        unpack(tar, inside)
    assert list(tmp_path.rglob("*")) == [inside]

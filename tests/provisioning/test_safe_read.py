"""Reading files of the services' user as root: no links, no waiting, no endless files."""

import os
import subprocess
from pathlib import Path

import pytest

from deploys.safe_read import FUNCTIONS, MAX_BYTES, why_not_read


def run(command: str, file: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", f'{FUNCTIONS} {command} "$1"', "sh", str(file)],
        capture_output=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b"a\x00b\x1b[2Jc\r\xff\xc3\xa9\td\n", b"ab[2Jcd\n"),
        (b"x" * MAX_BYTES, b"x" * MAX_BYTES),
        (b"y" * 10 + b"x" * MAX_BYTES, b"x" * MAX_BYTES),
    ],
    ids=["empty", "json", "control characters", "the most", "one more"],
)
def test_end_of_a_file_is_read_as_printable_text(
    content: bytes, expected: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(content)
    done = run("own_file", tmp_path / "file")
    assert done.stdout == expected


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root's")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    assert run("own_file", tmp_path / "link").stdout == b""
    kind = run("what_is", tmp_path / "link").stdout.decode()
    assert str(why_not_read(kind.strip())).startswith("is a symbolic link; expected a file of the")


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert run("own_file", tmp_path / "pipe").stdout == b""
    kind = run("what_is", tmp_path / "pipe").stdout.decode()
    assert str(why_not_read(kind.strip())).startswith("is a fifo; expected a file of the service's")


def test_folder_and_missing_file_are_told_apart(tmp_path: Path) -> None:
    assert run("own_file", tmp_path).stdout == b""
    folder = run("what_is", tmp_path).stdout.decode()
    assert str(why_not_read(folder.strip())).startswith("is a directory; ")
    missing = run("what_is", tmp_path / "nowhere")
    assert missing.returncode != 0
    assert (missing.stdout, missing.stderr) == (b"", b"")


@pytest.mark.parametrize(
    ("size", "is_read"), [(0, True), (MAX_BYTES, True), (MAX_BYTES + 1, False)]
)
def test_size_that_a_service_never_writes_is_named(
    size: int, is_read: bool, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("wb") as stream:
        stream.truncate(size)
    reason = why_not_read(run("what_is", tmp_path / "file").stdout.decode().strip())
    if is_read:
        assert reason is None
    else:
        assert str(reason).startswith("has 1048577 bytes; expected 1048576 at most: stop the")


def test_name_with_odd_characters_is_a_name(tmp_path: Path) -> None:
    odd = tmp_path / "a b;$(touch hurt)'\"\n*"
    odd.write_text("text")
    assert run("own_file", odd).stdout == b"text"
    assert not (tmp_path / "hurt").exists()

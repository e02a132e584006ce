"""Secrets are read by one function, whose errors name file, reason and expectation, not content."""

import os
import re
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import largest_file, without_rights
from worker import enrolment, settings
from worker.errors import ResourceError, SecretError
from worker.runtime import files
from worker.runtime.files import (
    HEX_KEY,
    LINE,
    MAX_SECRET_BYTES,
    WORD,
    append_line,
    read_secret,
    write_whole,
)

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cret-Value"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"s3cret-Value\nsecond\n", "2 lines instead of one"),
        (b"s3cret-Value\r\nX: y", "2 lines instead of one"),
        (b"s3cret-Value second", "2 words instead of one"),
        (b"\xff\xfes\x003\x00", "not UTF-8 text"),
        (b"\xef\xbb\xbfs3cret-Value\n", "has characters that can't be seen"),
        (b"s3cret\x00Value", "has characters that can't be seen"),
        ("s3crét-Value".encode(), "has characters other than ASCII"),
        (SECRET.encode() * 2000, f"more than {MAX_SECRET_BYTES:,} bytes"),
    ],
)
def test_file_that_is_no_secret_is_named_with_its_mistake(tmp_path, content, reason):
    file = tmp_path / "account.token"
    file.write_bytes(content)
    with pytest.raises(SecretError) as error:
        read_secret(file, "a token", "chain.account_token_file")
    assert str(error.value).startswith(f"{file} (chain.account_token_file): {reason}")
    assert str(error.value).endswith("; expected a token")
    assert "s3cr" not in str(error.value)
    assert error.value.exit_code == 2


def test_file_that_is_missing_or_a_folder_is_named(tmp_path):
    with pytest.raises(SecretError, match=r"none: No such file or directory; expected a token"):
        read_secret(tmp_path / "none", "a token")
    with pytest.raises(SecretError, match=r": Is a directory; expected a token"):
        read_secret(tmp_path, "a token")


def test_forms(tmp_path):
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    assert read_secret(file, "a token") == SECRET
    file.write_text("a pass phrase, für alle\n")
    assert read_secret(file, "a password", form=LINE) == "a pass phrase, für alle"
    file.write_text("0x" + "aB" * 32)
    assert read_secret(file, "a key", form=HEX_KEY) == "0x" + "aB" * 32
    file.write_text("ab" * 31)
    with pytest.raises(SecretError, match="not 64 hexadecimal digits"):
        read_secret(file, "a key", form=HEX_KEY)


def test_enrolment_token_of_two_lines_stops_the_enrolment(tmp_path):
    token = tmp_path / "token"
    token.write_text("one\ntwo\n")
    flat = {
        "node_state_dir": str(tmp_path / "node"),
        "node_min_free_disk_mb": 1,
        "chain_account_url": "http://127.0.0.1:1",
        "chain_enrolment_token_file": str(token),
    }
    with pytest.raises(SecretError, match=r"token \(chain.enrolment_token_file\): 2 lines instead"):
        enrolment.run(settings.from_flat(flat, "test"))


def test_nothing_else_reads_one_line_files_of_secrets():
    """A file whose name says token, password or key is read by read_secret alone."""
    reader = re.compile(r"(\w*(?:token|password|passphrase|key)\w*(?:\[.*\])?\)?)\.read_text\(")
    places = []
    for file in [*(ROOT / "worker").rglob("*.py"), *(ROOT / "deploys").rglob("*.py")]:
        places += [f"{file.name}: {found}" for found in reader.findall(file.read_text())]
    assert places == []


def test_write_whole_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "status.json"
    write_whole(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(ResourceError, match=r"status.json: can't be written: No space left"):
        write_whole(file, "new", durable=False)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_mode_is_the_one_asked_for_whatever_the_umask_and_the_file_before(tmp_path, mode, umask):
    file = tmp_path / "file"
    file.touch(0o666)
    before = os.umask(umask)
    try:
        write_whole(file, "secret", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == mode


# ---- secrets


@pytest.mark.parametrize("spaces", [b"", b"\n", b" \t\r\n"])
def test_longest_secret_is_read_and_one_byte_more_is_refused(tmp_path, spaces):
    file = tmp_path / "secret"
    file.write_bytes(b"x" * (MAX_SECRET_BYTES - len(spaces)) + spaces)
    assert len(read_secret(file, "a token")) == MAX_SECRET_BYTES - len(spaces)
    file.write_bytes(b"x" * (MAX_SECRET_BYTES + 1 - len(spaces)) + spaces)
    with pytest.raises(SecretError, match=r"more than 16,384 bytes; expected a token"):
        read_secret(file, "a token")


def test_secret_that_may_not_be_read_is_named_with_its_reason(tmp_path):
    file = tmp_path / "secret"
    file.write_text(SECRET)
    with without_rights(file), pytest.raises(SecretError, match="Permission denied; expected"):
        read_secret(file, "a token", "hub.token_file")


@pytest.mark.parametrize(
    "text",
    ["ab" * 31, "ab" * 33, "0X" + "ab" * 32, "g" * 64, "0x" * 32, "ab" * 31 + "a\u0663"],
)
def test_key_is_64_hexadecimal_digits_and_nothing_else(tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(SecretError, match="not 64 hexadecimal digits; expected a key"):
        read_secret(file, "a key", form=HEX_KEY)


@pytest.mark.parametrize("hidden", ["\u200b", "\u202e", "\u2028", "\ufeff", "\x85", "\x7f"])
def test_character_that_nobody_sees_is_no_part_of_a_password(tmp_path, hidden):
    file = tmp_path / "password"
    file.write_text(f"pass{hidden}word")
    with pytest.raises(SecretError):
        read_secret(file, "a password", form=LINE)


@given(before=st.binary(max_size=40), after=st.binary(max_size=40))
def test_no_content_is_both_refused_and_shown(tmp_path_factory, before, after):
    file = tmp_path_factory.getbasetemp() / "any-secret"
    file.write_bytes(before + b"QZJX7QZJX7" + after)
    text, reason = "", ""
    try:
        text = read_secret(file, "a token")
    except SecretError as error:
        reason = str(error)
    assert bool(text) != bool(reason)
    assert "QZJX7" not in reason
    assert "\n" not in reason
    assert not text or (WORD.fullmatch(text) and text in file.read_bytes().decode())


# ---- whole files


def test_durable_file_and_then_its_name_are_brought_to_the_disk(tmp_path, monkeypatch):
    synced = []

    def sync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(synced) == 1:
            assert not (tmp_path / "a/key").exists()
        else:
            assert (tmp_path / "a/key").read_text() == "key"

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(tmp_path / "a/key", "key")
    content, folder = synced
    assert Path(content).name.startswith(".key.")
    assert folder == str(tmp_path / "a")
    write_whole(tmp_path / "status", "now", durable=False)
    assert len(synced) == 2


def test_file_system_without_durable_names_is_taken_and_a_broken_one_is_not(tmp_path, monkeypatch):
    errors = iter([None, OSError(22, "Invalid argument"), None, OSError(5, "Input/output error")])

    def sync(_):
        if error := next(errors):
            raise error

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(tmp_path / "file", "1")
    with pytest.raises(ResourceError, match="Input/output error"):
        write_whole(tmp_path / "file", "2")


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "state.json"
    write_whole(file, "old")
    with (
        largest_file(4096),
        pytest.raises(ResourceError, match=rf"can't be written: .*; make room.* in {tmp_path}"),
    ):
        write_whole(file, "x" * 5000)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_folder_without_rights_is_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with without_rights(folder), pytest.raises(ResourceError, match=r"Permission denied; make"):
        write_whole(folder / "file", "x")


@pytest.mark.parametrize("content", ["", b"", "\u00fc\n", b"\xff\x00"])
def test_content_is_written_as_it_is(tmp_path, content):
    file = tmp_path / "new/folder/file"
    write_whole(file, content, durable=False)
    assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_reader_never_sees_half_of_what_many_write_at_once(tmp_path):
    file = tmp_path / "file"
    contents = [letter * 50_000 for letter in "abcd"]
    write_whole(file, contents[0], durable=False)

    def write(content):
        for _ in range(20):
            write_whole(file, content, durable=False)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert file.read_text() in contents
    assert list(tmp_path.iterdir()) == [file]


# ---- lines


LINES = st.lists(
    st.tuples(st.text(st.characters(exclude_characters="\n\r", codec="utf-8")), st.binary()),
    max_size=8,
)


@given(LINES, st.integers(1, 9))
def test_each_line_survives_and_each_torn_one_is_gone(tmp_path_factory, steps, piece_bytes):
    """A step is a line, and what a crash leaves of the line after it."""
    file = tmp_path_factory.getbasetemp() / "lines"
    file.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE_BYTES", piece_bytes)
        for line, torn in steps:
            append_line(file, line)
            with file.open("ab") as stream:
                stream.write(torn.replace(b"\n", b""))
        append_line(file, "last")
    expected = [*(line for line, _ in steps), "last"]
    assert file.read_bytes() == "".join(f"{line}\n" for line in expected).encode()


def test_torn_line_of_any_length_is_removed(tmp_path):
    file = tmp_path / "rounds.jsonl"
    append_line(file, "first")
    with file.open("ab") as stream:
        stream.write(bytes(3 * files._PIECE_BYTES + 1))
    append_line(file, "second")
    assert file.read_text() == "first\nsecond\n"


def test_line_that_did_not_fit_on_the_disk_is_followed_by_the_next(tmp_path):
    file = tmp_path / "rounds.jsonl"
    append_line(file, "first")
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        append_line(file, "x" * 200)
    assert file.stat().st_size > len("first\n")
    append_line(file, "second")
    assert file.read_text() == "first\nsecond\n"


def test_folder_of_lines_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        append_line(tmp_path / "none/rounds.jsonl", "line")

"""Secrets are read by one function, whose errors name file, reason and expectation, not content."""

import os
import re
import stat
from pathlib import Path

import pytest

from worker import enrolment, settings
from worker.errors import ResourceError, SecretError
from worker.runtime.files import HEX_KEY, LINE, MAX_SECRET_BYTES, read_secret, write_whole

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

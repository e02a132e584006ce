"""Lines of the log: one form, no secrets, nothing that a terminal obeys."""

import json
import logging
import string
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import log
from worker.runtime.files import read_secret


@pytest.fixture(autouse=True)
def _log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_hidden", set())
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], _ = before
    root.setLevel(before[1])
    logging.captureWarnings(False)


def emit(capsys, format, message, *args):
    log.setup("INFO", format)
    logging.getLogger("worker.test").info(message, *args)
    return capsys.readouterr().err


def test_text_line_has_time_level_logger_and_message(capsys):
    line = emit(capsys, "text", "round finished round=%d", 12)
    assert line.endswith("Z INFO worker.test round finished round=12\n")
    assert line[:2] == "20"
    assert line[10] == "T"


def test_terminal_escapes_from_peers_are_shown_not_obeyed(capsys):
    line = emit(capsys, "text", "peer said text=%s", "\x1b[31mred\nfake line\x07")
    assert "\\x1b[31mred\\nfake line\\x07" in line
    assert line.count("\n") == 1


def test_what_only_its_owner_should_know_of_an_address_is_in_no_log(capsys):
    urls = (
        "https://me:hunter2@rpc.example.org/v3/0123456789abcdef0123456789"
        " http://h:8545/?key=hunter2"
    )
    for format in ("text", "json"):
        line = emit(capsys, format, "rpc address changed to=%s", urls)
        assert "hunter2" not in line
        assert "0123456789abcdef" not in line
        assert "https://[redacted]@rpc.example.org/v3/[redacted] http://h:8545/?[redacted]" in line
    log.setup("INFO", "text")
    try:
        raise ValueError(urls)
    except ValueError:
        logging.getLogger("worker.test").exception("failed")
    assert "hunter2" not in capsys.readouterr().err
    plain = (
        "http://10.0.0.1:3000/api/swarm and"
        " /ip4/10.0.0.1/tcp/38000/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    )
    assert plain in emit(capsys, "text", "%s", plain)


def test_traceback_that_quotes_a_peer_cannot_pass_for_log_lines(capsys):
    log.setup("INFO", "text")
    try:
        raise ValueError("bad\n2026-11-23T07:30:12.345Z INFO worker.node all is well\x1b[2J")
    except ValueError:
        logging.getLogger("worker.test").exception("failed")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("ERROR worker.test failed")
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in "".join(rest)


def test_json_line_is_one_json_object(capsys):
    entry = json.loads(emit(capsys, "json", "round finished round=%d", 3))
    assert entry["message"] == "round finished round=3"
    assert entry["level"] == "INFO"


def test_printable_keeps_letters_of_all_scripts():
    assert log.printable("naïve 数") == "naïve 数"


def test_secret_that_was_read_is_in_no_line_even_if_a_server_quotes_it(capsys, tmp_path):
    file = tmp_path / "password"
    file.write_text("quoted-by-the-server-7\n")
    assert read_secret(file, "a password") == "quoted-by-the-server-7"
    for format in ("text", "json"):
        line = emit(capsys, format, "mail refused error=%s", "535 no: quoted-by-the-server-7.")
        assert "quoted-by-the-server" not in line
        assert "535 no: [redacted]." in line
    log.hide_passwords("endpoint: http://someone:password-of-7-miles@hub.example:80/x")
    assert log.discreet("wrong: password-of-7-miles") == "wrong: [redacted]"
    log.hide("worker")  # shorter ones would redact words
    assert "worker.test" in emit(capsys, "text", "the worker")
    assert log.discreet("the worker") == "the worker"


@pytest.mark.parametrize("order", [1, -1])
def test_secret_that_contains_another_one_is_hidden_whole(order):
    secrets = ["first-secret", "first-secret-and-more", "0x-first-secret-and-more"]
    for secret in secrets[::order]:
        log.hide(secret)
    for secret in secrets:
        assert log.discreet(f"got {secret}!") == "got [redacted]!"


@given(st.lists(st.text(string.ascii_letters, min_size=12, max_size=20), min_size=1), st.text())
def test_no_hidden_secret_is_in_any_text(secrets, between):
    log._hidden.clear()
    for secret in secrets:
        log.hide(secret)
    shown = log.discreet(between.join(secrets))
    assert not any(secret in shown for secret in secrets)


@pytest.mark.parametrize(("length", "shown"), [(11, "x" * 11), (12, "[redacted]")])
def test_only_words_that_are_long_enough_are_looked_for(length, shown):
    log.hide("x" * length)
    assert log.discreet("x" * length) == shown


PASSWORDS = st.text(string.ascii_letters + string.digits + "@:!$&*+,;=%~^|{}()?#", min_size=1)


@given(st.sampled_from(["http", "https", "socks5h", "postgres"]), PASSWORDS)
def test_password_in_an_address_is_never_shown(scheme, password):
    secret = f"A7{password}7Z"
    for address in (f"{scheme}://user:{secret}@host.example/x", f"{scheme}://{secret}@host"):
        shown = log.discreet(f"can't reach {address}: refused")
        assert secret not in shown
        assert f"{scheme}://[redacted]@host" in shown
        assert shown.endswith(": refused")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://h/?a=b", "http://h/?[redacted]"),
        ("http://h/" + "k" * 23, "http://h/" + "k" * 23),
        ("http://h/" + "k" * 24, "http://h/[redacted]"),
        ("http://h/v3/" + "k" * 32 + "/eth", "http://h/v3/[redacted]/eth"),
        ("'http://u:p@h' and 'http://h'", "'http://[redacted]@h' and 'http://h'"),
        ("http://h and me@example.org", "http://h and me@example.org"),
        ("no address?a=b", "no address?a=b"),
    ],
)
def test_credentials_of_addresses_are_redacted_and_the_rest_is_not(address, shown):
    assert log.discreet(address) == shown


@given(st.text())
def test_any_text_is_one_printable_line(text):
    shown = log.printable(text)
    assert shown.isprintable()
    assert log.printable(shown) == shown
    assert not text.isprintable() or shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb", "a\\tb"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("", ""),
    ],
)
def test_characters_that_change_a_terminal_are_written_out(text, shown):
    assert log.printable(text) == shown


@given(st.text())
def test_json_line_gives_back_any_message(text):
    record = logging.LogRecord("worker.test", 20, "", 0, "%s", (text,), None)
    line = log._JsonFormatter().format(record)
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line)["message"] == log.discreet(text)


@pytest.mark.parametrize("format", ["text", "json"])
def test_traceback_is_in_both_forms(capsys, format):
    log.setup("INFO", format)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("worker.test").exception("failed")
    written = capsys.readouterr().err
    assert "ValueError: broken" in written
    if format == "json":
        assert "ValueError: broken" in json.loads(written)["exception"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("DEBUG", ["d", "i", "w"]),
        ("INFO", ["i", "w"]),
        ("WARNING", ["w"]),
        ("ERROR", []),
    ],
)
def test_lines_below_the_level_are_left_out(capsys, level, shown):
    log.setup(level)
    mine = logging.getLogger("worker.test")
    mine.debug("d")
    mine.info("i")
    mine.warning("w")
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == shown


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "ERROR"])
def test_libraries_that_talk_much_only_warn(capsys, level):
    log.setup(level)
    logging.getLogger("urllib3").info("GET /")
    logging.getLogger("aiohttp.access").warning("odd")
    written = capsys.readouterr().err
    assert "GET /" not in written
    assert ("odd" in written) == (level != "ERROR")


def test_file_gets_the_same_lines_and_is_rotated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "MAX_FILE_BYTES", 200)
    monkeypatch.setattr(log, "NUM_OLD_FILES", 2)
    file = tmp_path / "worker.log"
    log.setup("INFO", "json", file)
    for number in range(20):
        logging.getLogger("worker.test").info("line %d", number)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 20
    kept = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert set(kept) == {"worker.log", "worker.log.1", "worker.log.2"}
    newest = [*kept["worker.log.2"], *kept["worker.log.1"], *kept["worker.log"]]
    assert newest == shown[-len(newest) :]


def test_second_set_up_replaces_the_first(capsys):
    log.setup("INFO", "text")
    line = emit(capsys, "json", "once")
    assert json.loads(line)["message"] == "once"
    assert len(line.splitlines()) == 1


def test_file_that_can_not_be_made_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        log.setup("INFO", "text", tmp_path / "none/worker.log")
    with pytest.raises(IsADirectoryError):
        log.setup("INFO", "text", tmp_path)


def test_warnings_of_python_are_lines_of_the_log(capsys):
    import warnings

    log.setup("WARNING")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way\x1b[2J", DeprecationWarning, stacklevel=1)
    written = capsys.readouterr().err
    assert " WARNING py.warnings " in written
    assert "\\x1b[2J" in written
    assert len(written.splitlines()) == 1

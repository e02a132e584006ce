import json
import logging

from worker import log
from worker.runtime.files import read_secret


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

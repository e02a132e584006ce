import json
import logging

from worker import log


def emit(capsys, format, message, *args):
    log.setup("INFO", format)
    logging.getLogger("worker.test").info(message, *args)
    return capsys.readouterr().err


def test_text_line_has_time_level_logger_and_message(capsys):
    line = emit(capsys, "text", "round finished round=%d", 12)
    assert line.endswith("Z INFO worker.test round finished round=12\n")
    assert line[:2] == "20"
    assert line[10] == "T"


def test_terminal_escapes_from_strangers_are_shown_not_obeyed(capsys):
    line = emit(capsys, "text", "peer said text=%s", "\x1b[31mred\nfake line\x07")
    assert "\\x1b[31mred\\nfake line\\x07" in line
    assert line.count("\n") == 1


def test_json_line_is_one_json_object(capsys):
    entry = json.loads(emit(capsys, "json", "round finished round=%d", 3))
    assert entry["message"] == "round finished round=3"
    assert entry["level"] == "INFO"


def test_printable_keeps_letters_of_all_scripts():
    assert log.printable("naïve 数") == "naïve 数"

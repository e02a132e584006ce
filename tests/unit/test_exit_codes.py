"""How a command ends: its code, and a last line on standard error that says why."""

import errno
import os
import subprocess
import sys

import pytest

from worker import cli, errors, log
from worker.runtime import entry_point

TREE = [errors.WorkerError]
for kind in TREE:
    TREE += kind.__subclasses__()
EXTRA = {errors.ContractRefused: ("NoPeer",), errors.BadRecord: ("seed",)}
OURS = [kind for kind in dict.fromkeys(TREE) if kind.__module__ == errors.__name__]


def replace_target(monkeypatch, happens) -> None:
    """Have every command call `happens`; options of commands are loaded as ever."""
    load = entry_point.load
    monkeypatch.setattr(
        entry_point, "load", lambda target: load(target) if ".options:" in target else happens
    )


@pytest.fixture
def ends(monkeypatch, tmp_path, capsys):
    """Return a function that runs `hivewright check` with what happens in it: (code, stderr)."""
    monkeypatch.setattr(log, "_hidden", set())
    monkeypatch.setattr(log, "setup", lambda *_: None)
    settings_file = tmp_path / "settings.yaml"
    settings_file.write_text("{}\n")

    def run(happens):
        with monkeypatch.context() as patch:
            replace_target(patch, happens)
            with pytest.raises(SystemExit) as end:
                cli.main(["check", "--settings", str(settings_file)])
        return end.value.code, capsys.readouterr().err

    return run


def raising(error: BaseException):
    def happens(*_):
        raise error

    return happens


def test_command_that_works_ends_with_0_and_says_nothing(ends):
    assert ends(lambda *_: None) == (0, "")


@pytest.mark.parametrize("kind", OURS)
def test_error_ends_with_the_code_of_its_class_and_its_message(ends, kind):
    error = kind(*EXTRA.get(kind, ()), "x: got 1; expected 2; do this")
    name = "SettingsError" if issubclass(kind, errors.SettingsError) else kind.__name__
    code = kind.exit_code
    expected = f"hivewright check: {name} (exit {code}): x: got 1; expected 2; do this\n"
    assert ends(raising(error)) == (code, expected)


@pytest.mark.parametrize("number", cli._MACHINE_ERRORS)
def test_error_of_the_machine_ends_with_4_and_names_the_file(ends, number):
    reason = os.strerror(number)
    code, text = ends(raising(OSError(number, reason, "/srv/state")))
    assert code == errors.ResourceError.exit_code
    assert text == (
        f"hivewright check: ResourceError (exit 4): {reason} at /srv/state; make room or rights,"
        " then start again\n"
    )
    _, text = ends(raising(OSError(number, reason)))
    assert f"(exit 4): {reason}; make room" in text


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), KeyError("x"), OSError()])
def test_mistake_of_the_program_is_not_hidden(monkeypatch, tmp_path, error):
    (tmp_path / "settings.yaml").write_text("{}\n")
    monkeypatch.setattr(log, "setup", lambda *_: None)
    replace_target(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        cli.main(["check", "--settings", str(tmp_path / "settings.yaml")])


def test_interrupt_ends_with_130(ends):
    assert ends(raising(KeyboardInterrupt())) == (130, "hivewright check: interrupted\n")


def test_several_mistakes_are_a_line_each_and_the_last_line_has_the_first(ends):
    error = errors.SettingsError.of("file", ["a: 1", "b: 2", "c: 3"])
    code, text = ends(raising(error))
    lines = text.splitlines()
    assert code == 2
    assert lines[-1].startswith("hivewright check: SettingsError (exit 2): file: ")
    assert lines[-1].endswith("; correct this and 2 more, a line each above")
    assert len(lines) == 3
    assert all(mistake in text for mistake in ("a: 1", "b: 2", "c: 3"))


def test_one_mistake_is_one_line(ends):
    code, text = ends(raising(errors.SettingsError.of("file", ["a: 1"])))
    assert (code, text) == (2, "hivewright check: SettingsError (exit 2): file: a: 1\n")


@pytest.mark.parametrize("hostile", ["two\nlines", "\x1b[2J", "a\r\nb", "\u202e", "\x85", "\0"])
def test_reason_of_anybody_is_one_printable_line(ends, hostile):
    for error in (errors.SwarmError(hostile), OSError(errno.EIO, hostile)):
        _, text = ends(raising(error))
        assert text.count("\n") == 1
        assert text.removesuffix("\n").isprintable()


def test_reason_shows_no_secret(ends):
    log.hide("a-secret-of-this-process")
    _, text = ends(raising(errors.ChainError("http://u:p@rpc: a-secret-of-this-process")))
    assert "a-secret" not in text
    assert "http://[redacted]@rpc: [redacted]" in text


def test_password_in_the_settings_is_in_no_error(monkeypatch, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("chain: {rpc_url: 'http://me:password-of-the-rpc@127.0.0.1:9'}\n")
    monkeypatch.setattr(log, "_hidden", set())
    monkeypatch.setattr(log, "setup", lambda *_: None)
    refusal = errors.ChainError("401: password-of-the-rpc is wrong")
    replace_target(monkeypatch, raising(refusal))
    with pytest.raises(SystemExit):
        cli.main(["check", "--settings", str(file)])
    assert capsys.readouterr().err.endswith("ChainError (exit 6): 401: [redacted] is wrong\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["check"], "check: got neither --settings FILE nor --model NAME_OR_FOLDER"),
        (["account"], "account: got no --settings FILE; expected the service's settings"),
        (["worker"], "the following arguments are required: --settings"),
        (["demo", "--workers", "0"], "got '0'; expected a whole number of at least 1"),
        (["demo", "--rounds", "9" * 5000], "expected a whole number of at least 1"),
        (["status", "--settings", "x", "--json", "--metrics"], "not allowed with argument"),
        (["eval", "--settings", "x", "--seed", "-1"], "got '-1'; expected a whole number from 0"),
        (["eval", "--settings", "x", "--seconds", "nan"], "got 'nan'; expected a number of sec"),
        (["fleet", "dance"], "invalid choice: 'dance'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_command_line_ends_with_2_and_names_it(capsys, words, reason):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert reason in last
    assert len(last) < 400


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"\xff\xfe", ""),
        (b"[]", ""),
        (b"a: [", ""),
        (b"\0", ""),
        (b"node: 7", "node"),
    ],
)
def test_settings_file_of_something_else_ends_with_2(tmp_path, capsys, content, reason):
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        cli.main(["status", "--settings", str(file)])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hivewright status: SettingsError (exit 2): ")
    assert str(file) in last
    assert reason in last


def test_reader_that_closes_the_output_is_no_error():
    code = (
        "import sys; from worker import cli, log\n"
        "from worker.runtime import entry_point\n"
        "def speak(*_):\n"
        "    for _ in range(100_000): print('a line of the ledger')\n"
        "load = entry_point.load\n"
        "entry_point.load = lambda target: load(target) if '.options:' in target else speak\n"
        "cli.main(['demo'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "a line of the ledger\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_commands_have_different_names_and_targets():
    names = [command.name for command in cli.COMMANDS]
    assert len(set(names)) == len(names)
    targets = [command.target for command in cli.COMMANDS]
    assert len(set(targets)) == len(targets)

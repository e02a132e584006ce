"""The command line: fast help, and exit codes that mean something."""

import subprocess
import sys

import pytest

from worker import cli, errors, log
from worker.runtime import entry_point


def hivewright(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], *([*c.name.split(), "--help"] for c in cli.COMMANDS)], ids=" ".join
)
def test_help_of_every_command_loads_no_heavy_part(arguments):
    code = (
        "import sys\nfrom worker import cli\n"
        f"try:\n    cli.main({arguments!r})\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'hivemind', 'web3', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: hivewright" in done.stdout


def test_every_command_names_a_function_that_exists():
    for command in cli.COMMANDS:
        assert callable(entry_point.load(command.target)), command.name


def test_unknown_command_exits_with_2_and_one_line():
    done = hivewright("trian")
    assert done.returncode == 2
    assert "invalid choice: 'trian'" in done.stderr.splitlines()[-1]


def test_wrong_settings_exit_with_2_and_say_why(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("trainer: {learningrate: 1}\n")
    done = hivewright("check", "--settings", str(file))
    assert done.returncode == 2
    assert (
        done.stderr == f"hivewright check: SettingsError (exit 2): settings file {file}: "
        "trainer.learningrate: not a known key; did you mean trainer.learning_rate?\n"
    )


def test_mistakes_of_a_file_stand_in_a_line_each_and_the_last_line_says_what_to_do(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("trainer: {gamma: 1, epsilon: 0, learningrate: 1}\n")
    *lines, last = hivewright("check", "--settings", str(file)).stderr.splitlines()
    assert lines == [
        f"settings file {file}: trainer.epsilon: got 0; expected greater than 0",
        (
            f"settings file {file}: trainer.gamma: not a known key; docs/configuration.md lists all"
            " keys"
        ),
    ]
    assert (
        last
        == f"hivewright check: SettingsError (exit 2): settings file {file}: trainer.learningrate:"
        " not a known key; did you mean trainer.learning_rate?; correct this and 2 more, a line"
        " each above"
    )


def run_here(monkeypatch, *arguments) -> int:
    """Run a command in this process, which has imported all of it; return its exit code."""
    monkeypatch.setattr(log, "_hidden", set())
    monkeypatch.setattr(log, "setup", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def test_check_prints_what_a_file_resolves_to(tmp_path, monkeypatch, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("trainer: {learning_rate: 0.5}\n")
    assert run_here(monkeypatch, "check", "--settings", str(file)) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 0.5" in shown
    assert "num_generations: 8" in shown


def test_check_knows_the_families(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("environment: {families: [{name: chain_sums}]}\n")
    done = hivewright("check", "--settings", str(file))
    assert done.returncode == 2
    assert "chain_sums" in done.stderr.splitlines()[-1]


def test_missing_identity_exits_with_3_and_makes_no_key(tmp_path, monkeypatch, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(f"node: {{state_dir: {tmp_path / 'state'}, min_free_disk_mb: 1}}\n")
    assert run_here(monkeypatch, "worker", "--settings", str(file)) == 3
    assert "identity missing" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "state/swarm.pem").exists()


def test_every_error_has_its_own_exit_code():
    tree = [errors.WorkerError]
    for kind in tree:
        tree += kind.__subclasses__()
    own = [kind for kind in tree if "exit_code" in vars(kind)]
    assert len({kind.exit_code for kind in own}) == len(own)
    assert 0 not in {kind.exit_code for kind in tree}


def test_help_loads_no_library_that_takes_seconds():
    code = """
import sys
from worker import cli
try:
    cli.main(["--help"])
finally:
    print([name for name in ("torch", "transformers", "web3", "hivemind", "aiohttp")
           if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("role", ["worker", "keeper", "account", "dashboard"])
def test_an_answer_nested_without_end_ends_no_process(role):
    code = f"""
import json, threading
from worker import cli
from worker.runtime import entry_point
entry_point.load(next(command.target for command in cli.COMMANDS if command.name == {role!r}))
import web3
def read():
    try:
        json.loads("[" * 1_000_000)
    except RecursionError:
        print("refused")
thread = threading.Thread(target=read)
thread.start()
thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr

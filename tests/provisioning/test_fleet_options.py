"""Options of the fleet commands: defaults, bounds, and what a refusal says."""

import argparse
from pathlib import Path

import pytest

from deploys.fleet import options

INVENTORY = ["inventory.py"]
BACKUP = ["--archive", "fleet.backup"]


def parsed(name: str, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    getattr(options, name)(parser)
    return parser.parse_args([*INVENTORY, *arguments])


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        (
            "rollout",
            {
                "batch": "25%",
                "gate_rounds": 1,
                "gate_seconds": 1800,
                "gate_reward": 0.25,
                "no_gate_credits": False,
                "deadline": 3600,
                "resume": False,
                "output": None,
                "break_lock": False,
            },
        ),
        ("hosts", {"limit": None}),
        ("changes", {"limit": None, "break_lock": False}),
        ("services", {"limit": None, "break_lock": False, "unit": "*"}),
        ("status", {"limit": None, "json": False}),
        ("watch", {"limit": None, "every": 10, "times": None}),
        ("logs", {"limit": None, "follow": False, "lines": 50, "unit": "*"}),
        ("inventory", {}),
        ("rotation", {"break_lock": False}),
        (
            "uninstall",
            {"limit": None, "break_lock": False, "identities": False, "yes": False},
        ),
        (
            "harvest",
            {
                "limit": None,
                "output": None,
                "tasks": 32,
                "seed": 0,
                "seconds": 600,
                "average": True,
            },
        ),
    ],
)
def test_defaults(name, defaults) -> None:
    assert vars(parsed(name)) == {"inventory": "inventory.py"} | defaults


@pytest.mark.parametrize(
    ("name", "arguments", "key", "value"),
    [
        ("hosts", ["--limit", "a", "--limit", "b*"], "limit", ["a", "b*"]),
        ("rollout", ["--gate-reward", "0"], "gate_reward", 0.0),
        ("rollout", ["--gate-reward", "1"], "gate_reward", 1.0),
        ("rollout", ["--gate-rounds", "8"], "gate_rounds", 8),
        ("watch", ["--every", "3600"], "every", 3600),
        ("logs", ["--lines", "1"], "lines", 1),
        ("harvest", ["--no-average"], "average", False),
        ("harvest", ["--output", "model"], "output", Path("model")),
        ("backup", BACKUP, "archive", Path("fleet.backup")),
        ("backup", BACKUP, "passphrase_file", None),
        ("restore", [*BACKUP, "--to", "new"], "source", None),
        ("restore", [*BACKUP, "--to", "new", "--from", "old"], "source", "old"),
    ],
)
def test_value_of_an_option(name, arguments, key, value) -> None:
    assert vars(parsed(name, *arguments))[key] == value


@pytest.mark.parametrize(
    ("name", "option", "text", "expected"),
    [
        ("rollout", "--gate-rounds", "0", "expected a whole number from 1 to 8"),
        ("rollout", "--gate-rounds", "9", "expected a whole number from 1 to 8"),
        ("rollout", "--gate-seconds", "1.5", "expected a whole number of at least 1"),
        ("rollout", "--deadline", "0", "expected a whole number of at least 1"),
        ("rollout", "--gate-reward", "1.01", "expected a share from 0 to 1"),
        ("rollout", "--gate-reward", "-0.1", "expected a share from 0 to 1"),
        ("rollout", "--gate-reward", "nan", "expected a share from 0 to 1"),
        ("rollout", "--gate-reward", "half", "expected a share from 0 to 1"),
        ("watch", "--every", "3601", "expected a whole number from 1 to 3600"),
        ("watch", "--times", "0", "expected a whole number of at least 1"),
        ("logs", "--lines", "10001", "expected a whole number from 1 to 10000"),
        ("harvest", "--tasks", "0", "expected a whole number from 1 to 10000"),
        ("harvest", "--seed", "x", "expected a whole number of at least 0"),
        ("harvest", "--seconds", "86401", "expected a whole number from 1 to 86400"),
    ],
)
def test_value_out_of_bounds_is_refused(name, option, text, expected) -> None:
    with pytest.raises(argparse.ArgumentError) as refusal:
        parsed(name, f"{option}={text}")
    assert str(refusal.value) == f"argument {option}: got {text!r}; {expected}"


@pytest.mark.parametrize(
    ("name", "arguments", "missing"),
    [("backup", [], "--archive"), ("restore", BACKUP, "--to"), ("restore", [], "--archive, --to")],
)
def test_option_without_a_default_is_required(name, arguments, missing, capsys) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)) as refusal:
        parsed(name, *arguments)
    said = capsys.readouterr().err + str(refusal.value)
    assert f"the following arguments are required: {missing}" in said

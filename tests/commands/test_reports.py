"""What people read in a terminal of 80 columns."""

import argparse
import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from worker import settings
from worker.commands import reports
from worker.commands.reports import print_status, swarm_table
from worker.errors import SettingsError
from worker.hub.hub import HubStatus
from worker.swarm.status import SwarmStatus
from worker.telemetry.status import NodeStatus


def node(**changes):
    status = NodeStatus(
        "gpu-12-7", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", **changes
    )
    status.ledger = {"earned": 9999, "sent": 0, "confirmed": 9999, "rejected": 0}
    return status


def lines(*nodes):
    out = io.StringIO()
    Console(file=out, width=80).print(swarm_table(nodes))
    return out.getvalue().splitlines()


def test_table_fits_80_columns_after_months_and_in_an_outage():
    busy = {
        "round": 12345,
        "reward_mean": 0.5,
        "loss": -0.1234,
        "peers_heard": 4,
        "groups_local": 9,
        "groups_external": 9,
        "swarm": SwarmStatus("connected", "Qm", rejected={"flood": 1234}),
        "tokens_per_second": 12345.6,
        "round_seconds": 599.9,
    }
    shown = lines(
        node(chain="ok", state="connected", **busy),
        node(chain="unreachable", state="training-alone", **busy),
        node(chain="unknown", state="starting"),
        node(chain="ok", state="catching-up", **busy),
    )
    assert not any("…" in line for line in shown), shown
    assert max(map(len, shown)) <= 80
    assert "down" in shown[2]
    assert "alone" in shown[2]


def test_name_of_a_peer_cannot_drive_the_terminal():
    status = node()
    status.name = "\x1b[2Jx"
    assert "\x1b" not in "".join(lines(status))


def test_status_tells_bets_and_calibration_by_family(tmp_path, capsys):
    status = node()
    status.market = {"paid": 3, "lost": 1, "skipped": 2, "rated": 4, "brier": 0.5}
    status.market_brier = {"bf": 0.25, "\x1b[2J": 2.0}
    status.write(tmp_path)
    parsed = settings.from_flat({"node_state_dir": str(tmp_path)}, "test")
    print_status(parsed, argparse.Namespace(json=False, metrics=False))
    printed = capsys.readouterr().out
    assert "bets in the prediction market: 3 paid, 1 lost, 2 skipped\n" in printed
    assert "Brier score of 4 answers (0 best, 2 worst): 0.500\n" in printed
    assert "  bf 0.250\n" in printed
    assert "\x1b" not in printed


def test_status_says_what_of_the_hub_and_of_other_versions_there_is_to_know(tmp_path, capsys):
    status = node()
    status.swarm = SwarmStatus(
        "connected",
        "Qm",
        5,
        ("QmA", "QmB"),
        {"seed": 3, "\x1b[2J": 1},
        groups_offered=36,
        groups_fetched=40,
        groups_verified=36,
        bytes_in=120_400,
        bytes_out=99_600,
        newest_group_at=time.time() - 42,
        requests_refused={"full": 7},
        refused_by_peers={"not-allowed": 2},
        versions=("exchange 3", "reasoning-gym 0.1.25"),
        other_versions={"reasoning-gym 0.1.24": 2, "exchange 2": 1},
    )
    status.hub = HubStatus(
        "hive/model", "failed", round=200, pushed_round=100, failures=1, error="says 401"
    )
    status.extra_steps, status.extra_groups = 12, 108
    status.groups_behind = {2: 9, 0: 40}
    status.write(tmp_path)
    print_status(
        settings.from_flat({"node_state_dir": str(tmp_path)}, "test"),
        argparse.Namespace(json=False, metrics=False),
    )
    shown = capsys.readouterr().out
    assert "hub hive/model: round 100 pushed, now failed, failed 1 times: says 401" in shown
    assert "peers 5 known, 2 heard; newest group of theirs 42 s old" in shown
    assert "groups 36 given, 40 fetched, 36 verified; 120 kB in, 100 kB out" in shown
    assert "rejected: \\x1b[2J 1, seed 3\n" in shown
    assert "while rounds were open: 12 more steps, with 108 more groups of its own" in shown
    assert "the number of rounds that they were behind: 0: 40, 2: 9" in shown
    assert "refused to others: full 7" in shown
    assert "refused by others: not-allowed 2" in shown
    assert (
        "2 peers run reasoning-gym 0.1.24, this node reasoning-gym 0.1.25: they can't learn from"
        " each other" in shown
    )
    assert "1 peers run exchange 2, this node exchange 3: they can't learn from each other" in shown


@pytest.mark.parametrize(
    ("flat", "line"),
    [
        ({}, "# exchange: 9 groups of 8 answers a round, at their longest 81 of 2097 kB"),
        (
            {"environment_tasks_per_round": 400, "generation_max_completion_length": 24},
            "# exchange: only 64 of 400 groups a round are shared and earn",
        ),
        (
            {"generation_max_completion_length": 1500, "generation_num_generations": 64},
            "# exchange: only 5 of 9 groups a round are shared and earn",
        ),
    ],
)
def test_check_says_what_the_settings_come_to_on_the_wire(flat, line, capsys):
    small = {
        "environment_families": [{"name": "gcd"}],
        "model_name": "hivewright/tiny",
        "swarm_enabled": True,
    }
    reports.print_settings(
        settings.from_flat({**small, **flat}, "test"), argparse.Namespace(model=None)
    )
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "loaded"),
    [
        ("account: {port: 3000}", set()),
        ("judge: {port: 3000}\nenvironment: {families: [{name: gcd}]}", {"reasoning_gym"}),
        ("keeper: {}\nmodel: {name: hivewright/tiny}", {"reasoning_gym", "torch"}),
        ("log: {level: INFO}", {"reasoning_gym", "torch"}),
    ],
)
def test_check_loads_what_the_roles_of_the_file_need(text, loaded, tmp_path):
    """A deploy checks a file for each service."""
    (tmp_path / "settings.yaml").write_text(text)
    code = (
        "import sys\nfrom worker import cli\n"
        f"try:\n    cli.main(['check', '--settings', '{tmp_path}/settings.yaml'])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'reasoning_gym'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *resolved, last = done.stdout.splitlines()
    assert "version: 1" in resolved
    assert last == str(sorted(loaded))


def test_sections_by_which_check_tells_roles_exist():
    assert settings.Settings.model_fields.keys() >= reports._OTHER_ROLES | reports._OF_A_WORKER


def test_check_of_another_role_refuses_families_that_do_not_exist(tmp_path):
    named = settings.parse(
        {"keeper": {}, "environment": {"families": [{"name": "no_such_family"}]}}, "test"
    )
    with pytest.raises(SettingsError, match="no_such_family"):
        reports.print_settings(named, argparse.Namespace(model=None))

"""A node broken in ten ways: what its operator reads says what it is and what to do.

Each fault is put where the program measures it (a status file, an answer of a host, a recording of
nvidia-smi). The operator reads `hivewright status`, `hivewright fleet status` and the alerts.
"""

import argparse
import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from deploys.fleet.status import status_table
from deploys.fleet_facts import HostStates
from tests.runtime.test_gpu_health import changed, recording
from tests.telemetry.test_health import well
from worker import settings
from worker.chain.keeper import Status
from worker.commands.reports import print_status
from worker.runtime import gpu_health
from worker.swarm.status import SwarmStatus
from worker.telemetry import health
from worker.telemetry.status import NodeStatus

RULES = Path(__file__).parents[2] / "monitoring/alerts.yml"
NOW = time.time()
IN_TWO_DAYS = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW + 2 * 86400))
HOST = {"commit": "a" * 40, "deployed": "b", "disk_free_mb": 90_000, "disk_total_mb": 99_000}


@dataclass(frozen=True)
class Fault:
    """A fault, and what is read of it: words of the cause, and words of what to do.

    `node`: breaks the node's status; `host`: lines of the host's answer; `report`: changes of its
    report; `keeper`: the keeper's status. `in_status`: `hivewright status` shows it, too. `alert`:
    the rule that fires.
    """

    cause: str
    action: str
    alert: str
    node: Callable[[NodeStatus], None] = lambda node: None
    host: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    keeper: Status | None = None
    in_status: bool = True


def _gpu(text: str) -> Callable[[NodeStatus], None]:
    card, *_ = gpu_health.parse(text)
    return lambda node: setattr(node.condition, "gpu", card)


def _fell(node: NodeStatus) -> None:
    lines = [{"reward_mean": r, "peers_heard": ["Qm"]} for r in [*[0.7] * 40, *[0.0] * 8]]
    node.condition.recent = health.recent(lines)


def _alone(node: NodeStatus) -> None:
    node.state, node.swarm = "training-alone", SwarmStatus("training-alone", "Qm", reach="direct")
    node.condition.recent = health.recent([{"reward_mean": 0.5, "peers_heard": []}] * 8)


def _lied_to(node: NodeStatus) -> None:
    liar = {"rejected": {"answers": 9}, "quarantined": ("QmLiar",)}
    node.swarm = dataclasses.replace(SwarmStatus("connected", "Qm", reach="direct"), **liar)


def _without_chain(node: NodeStatus) -> None:
    node.chain, node.ledger = "unreachable", {"earned": 30, "confirmed": 5}
    node.ledger_error = "http://hub:3000: no connection"


FAULTS = {
    "no disk": Fault(
        "less free than node.min_free_disk_mb",
        "make room",
        "HivewrightDiskAlmostFull",
        node=lambda node: setattr(node.condition, "disk_spare_mb", -20),
        host=("disk= 12 99000",),
    ),
    "keeper stuck": Fault(
        "its round is open for 60 min, of at most 10 min: no round ends",
        "see that the chain runs",
        "HivewrightKeeperStuck",
        keeper=Status("round-open", 7, 0, 2, NOW - 3600, 600.0, "no receipt in 30 s"),
        in_status=False,
    ),
    "chain away": Fault(
        "does not answer: the node practises",
        "start chain and account service",
        "HivewrightRewardsNotConfirmed",
        node=_without_chain,
        keeper=Status("chain-unreachable", 7, problem="no connection"),
    ),
    "alone": Fault(
        "none answered in 100% of the rounds",
        "open swarm.port, or correct swarm.bootnodes",
        "HivewrightTrainingAlone",
        node=_alone,
    ),
    "reward collapsed": Fault(
        "mean 0.000, over the last 8 rounds; before these 0.700",
        "lower trainer.learning_rate",
        "HivewrightRewardCollapsed",
        node=_fell,
    ),
    "clock off": Fault(
        "90.0 s ahead of the account service's",
        "`timedatectl set-ntp true`",
        "HivewrightClockOff",
        node=lambda node: setattr(node.condition, "clock_offset", 90.0),
        host=(f"clock={int(NOW) + 90}",),
    ),
    "key expiring": Fault(
        "the Tailscale key expires in 2 days",
        "deploy again with an auth key",
        "HivewrightKeyExpires",
        host=(
            "tailscale="
            + json.dumps({"BackendState": "Running", "Self": {"KeyExpiry": IN_TWO_DAYS}}),
        ),
        in_status=False,
    ),
    "GPU throttled": Fault(
        "throttled: HW Thermal Slowdown",
        "cool it",
        "HivewrightGpuIll",
        node=_gpu(changed("HW Thermal Slowdown", "Active")),
    ),
    "peer lying": Fault(
        "1 in quarantine for invalid groups: QmLiar",
        "their groups do not count",
        "HivewrightPeersLie",
        node=_lied_to,
    ),
    "out of memory": Fault(
        "programs waited for memory in 59% of the last minute",
        "run fewer slots",
        "HivewrightMemoryShort",
        node=lambda node: setattr(node.condition, "memory_stalled", 0.59),
        host=tuple(f"pressure={x}" for x in recording("pressure-memory.txt").splitlines()),
        report={"result": "oom-kill"},
    ),
}


def status_of(node: NodeStatus, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `hivewright status` prints of the node."""
    node.write(folder)
    of = settings.from_flat({"node_state_dir": str(folder)}, "test")
    print_status(of, argparse.Namespace(json=False, metrics=False))
    return capsys.readouterr().out


def fleet_status_of(node: NodeStatus, fault: Fault) -> tuple[str, bool]:
    """Return what `hivewright fleet status` prints of the node and its host."""
    node.updated_at = time.time()
    worker = {"unit": "hivewright-worker@0.service", "active_state": "active", **fault.report}
    reports = [worker | {"status": dataclasses.asdict(node)}]
    if fault.keeper is not None:
        unit = {"unit": "hivewright-keeper.service", "active_state": "active"}
        began_at = fault.keeper.began_at and fault.keeper.began_at - NOW + time.time()
        keeper = dataclasses.replace(fault.keeper, began_at=began_at)
        reports.append(unit | {"status": dataclasses.asdict(keeper)})
    state = HostStates().process([*fault.host, "end"])
    assert state is not None
    units = {"gpu-1": [each["unit"] for each in reports]}
    states = {"gpu-1": HOST | {name: value for name, value in state.items() if value}}
    states["gpu-1"] = {"gpus": [], "tailscale": None} | states["gpu-1"]
    table, notes, is_well = status_table(units, states, {"gpu-1": reports}, time.time(), 120)
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return "\n".join([console.file.getvalue(), *notes]), is_well  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FAULTS)
def test_operator_reads_what_it_is_and_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, node = FAULTS[name], well()
    node.state, node.chain, node.pid = "connected", "ok", 1
    fault.node(node)
    health.watch(node)
    shown, _ = fleet_status_of(node, fault)
    assert fault.cause in shown, shown
    assert fault.action in shown, shown
    if fault.in_status:
        printed = " ".join(status_of(node, tmp_path, capsys).split())
        assert fault.cause in printed, printed
        assert fault.action in printed, printed


@pytest.mark.parametrize("name", FAULTS)
def test_an_alert_with_what_to_do_stands_for_it(name: str) -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    (rule,) = [rule for rule in rules if rule["alert"] == FAULTS[name].alert]
    assert rule["annotations"]["action"]


def test_well_node_has_none_of_these_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = well()
    node.state, node.pid = "connected", 1
    health.watch(node)
    shown, is_well = fleet_status_of(node, Fault("", "", ""))
    assert is_well
    printed = " ".join(status_of(node, tmp_path, capsys).split())
    for fault in FAULTS.values():
        assert fault.action not in shown
        assert fault.action not in printed

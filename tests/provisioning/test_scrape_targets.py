"""Targets for Prometheus of a fleet: ports of slots and services, and who reaches which."""

import json
from typing import Any

import pytest

from deploys import gpus
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry, HostPlan, Target
from deploys.inventory.scrape_targets import merged, render, targets_of
from deploys.services import COORDINATOR_ROLES
from worker.errors import SettingsError

HUB = {"account_host": "100.64.0.1", "metrics_port": 9400}
WORKER = {"slots": 2, "metrics_port": 9400, "ssh_hostname": "gpu-1.example"}


def plans(**of_worker: Any) -> dict[str, tuple[HostPlan, dict[str, Any]]]:
    data = {"hub": HUB, "gpu-1": WORKER | of_worker}
    groups = {"hub": ("coordinators",), "gpu-1": ("workers",)}
    of_pyinfra = frozenset({"ssh_hostname"})
    entries = [HostEntry(name, groups[name], data[name], of_pyinfra) for name in data]
    found = validation.check(entries)
    return {name: (plan, data[name]) for name, plan in found.items()}


def targets(**of_worker: Any) -> list[Target]:
    every: list[Target] = []
    for plan, data in plans(**of_worker).values():
        every += targets_of(plan, data)
    return every


def addresses(text: str) -> dict[str, str]:
    return {" ".join(group["labels"].values()): group["targets"][0] for group in json.loads(text)}


def test_services_and_slots_have_ports_of_their_own() -> None:
    found = {(t.host, t.service, t.slot): t.port for t in targets()}
    assert found == {
        **{("hub", role, None): 9399 - n for n, role in enumerate(COORDINATOR_ROLES)},
        ("gpu-1", "worker", 0): 9400,
        ("gpu-1", "worker", 1): 9401,
    }
    # Known to firewalls: a new service comes after these.
    known = ["chain", "bootnode", "keeper", "account", "dashboard", "judge"]
    assert [*COORDINATOR_ROLES][: len(known)] == known


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", {}),
        (
            "0.0.0.0",
            {"gpu-1 worker 0": "gpu-1.example:9400", "gpu-1 worker 1": "gpu-1.example:9401"},
        ),
        ("100.64.0.7", {"gpu-1 worker 0": "100.64.0.7:9400", "gpu-1 worker 1": "100.64.0.7:9401"}),
        ("fd7a::7", {"gpu-1 worker 0": "[fd7a::7]:9400", "gpu-1 worker 1": "[fd7a::7]:9401"}),
    ],
)
def test_loopback_is_only_for_a_prometheus_on_the_same_host(
    host: str, expected: dict[str, str]
) -> None:
    own = {f"hub {role}": f"127.0.0.1:{9399 - n}" for n, role in enumerate(COORDINATOR_ROLES)}
    assert addresses(render(targets(metrics_host=host), "hub")) == own | expected
    assert "hub" not in str(addresses(render(targets(metrics_host=host), "gpu-1")))


def test_facts_of_a_run_replace_what_the_inventory_alone_tells() -> None:
    known = targets(slots="auto")
    assert [t.slot for t in known if t.service == "worker"] == [0]
    plan, data = plans(slots="auto")["gpu-1"]
    rows = [f"gpu {n}, GPU-{n}, NVIDIA L4, 24564, 8.9, 580.95.05" for n in range(3)]
    counted = targets_of(plan.on(gpus.parse([*rows, "cuda 13.0"])), data)
    found = merged(known, {"gpu-1": counted})
    assert [t.port for t in found if t.host == "gpu-1"] == [9400, 9401, 9402]
    assert len([t for t in found if t.host == "hub"]) == len(COORDINATOR_ROLES)


def test_host_without_an_endpoint_has_no_target() -> None:
    assert not [t for t in targets(metrics_port=None) if t.host == "gpu-1"]


def test_two_processes_of_a_host_need_two_ports() -> None:
    with pytest.raises(SettingsError, match=r"slot 1: metrics_port: 9400 is that of slot 0"):
        plans(slots=[{}, {"metrics_port": 9400}])

"""Plans of single hosts: ports, names and folders of slots, and files that a host gets."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys import gpus
from deploys.gpus import Gpus
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry, HostPlan, clashes, nth_name
from deploys.services import COORDINATOR_ROLES
from worker.errors import SettingsError


def cards(num: int) -> Gpus:
    rows = [f"gpu {n}, GPU-{n}, NVIDIA L4, 23034, 8.9, 580.95.05" for n in range(num)]
    return gpus.parse([*rows, "cuda 13.0"] if num else [])


def plan(groups: tuple[str, ...] = ("workers",), /, **data: Any) -> HostPlan:
    entry = HostEntry("gpu-3", groups, {"swarm_enabled": False} | data)
    return validation.check([entry])["gpu-3"]


def hub(**data: Any) -> HostPlan:
    return plan(("coordinators",), **({"account_host": "192.0.2.1"} | data))


@pytest.mark.parametrize(("number", "name"), [(0, "gpu"), (1, "gpu-1"), (12, "gpu-12")])
def test_first_slot_has_the_name_of_the_host(number: int, name: str) -> None:
    assert nth_name("gpu", number) == name


@pytest.mark.parametrize(("num_cards", "num_slots"), [(0, 1), (1, 1), (8, 8)])
def test_auto_has_a_slot_for_each_gpu_or_one(num_cards: int, num_slots: int) -> None:
    auto = plan(slots="auto", swarm_port=38000, metrics_port=9400)
    slots = auto.on(cards(num_cards)).slots
    assert [slot.settings.metrics.port for slot in slots] == [9400 + n for n in range(num_slots)]
    assert [slot.settings.swarm.port for slot in slots] == [38000 + n for n in range(num_slots)]
    assert len({slot.settings.node.state_dir for slot in slots}) == num_slots
    assert len({slot.settings.market.record_file for slot in slots}) == num_slots


def test_any_port_stays_any_port_for_each_slot() -> None:
    slots = plan(slots="auto", swarm_port=0).on(cards(3)).slots
    assert [slot.settings.swarm.port for slot in slots] == [0, 0, 0]
    assert [slot.settings.metrics.port for slot in slots] == [None, None, None]


def test_each_slot_reads_the_token_for_the_hub_from_its_own_unit(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_token\n")
    auto = plan(slots="auto", hub_repo="me", hub_token_file=str(token))
    files = [slot.settings.hub.token_file for slot in auto.on(cards(2)).slots]
    assert files == [
        Path(f"/run/credentials/hivewright-worker@{n}.service/hub.token") for n in range(2)
    ]


@pytest.mark.parametrize(
    ("data", "num_cards", "message"),
    [
        (
            {"swarm_port": 65534},
            3,
            "slot 2: swarm_port: got 65536, counted up from slot 0's; expected at most 65535",
        ),
        ({"swarm_port": 65534}, 2, None),
        (
            {"swarm_port": 9400, "metrics_port": 9402},
            3,
            "slot 2: swarm_port: 9402 is that of slot 0 (metrics) too; give each its own, or 0",
        ),
        ({"swarm_port": 9400, "metrics_port": 9402}, 2, None),
    ],
)
def test_ports_of_slots_are_counted_up_until_they_meet_something(
    data: dict[str, Any], num_cards: int, message: str | None
) -> None:
    auto = plan(slots="auto", **data)
    if message is None:
        assert len(auto.on(cards(num_cards)).slots) == num_cards
        return
    with pytest.raises(SettingsError) as refused:
        auto.on(cards(num_cards))
    assert message in str(refused.value).splitlines()


@hypothesis_settings(max_examples=25, deadline=None, database=None)
@given(
    swarm=st.sampled_from([0, 100, 102, 8545, 65530]),
    metrics=st.sampled_from([None, 0, 98, 101, 104, 65535]),
    num=st.integers(1, 6),
)
def test_slots_are_accepted_if_and_only_if_no_port_is_used_twice(
    swarm: int, metrics: int | None, num: int
) -> None:
    ports = [swarm + n for n in range(num) if swarm] + [metrics + n for n in range(num) if metrics]
    is_right = len(set(ports)) == len(ports) and all(port <= 65535 for port in ports)
    auto = plan(slots="auto", swarm_port=swarm, metrics_port=metrics)
    try:
        auto.on(cards(num))
    except SettingsError:
        assert not is_right
    else:
        assert is_right


def test_services_of_a_coordinator_have_ports_of_their_own() -> None:
    with pytest.raises(SettingsError, match="judge_port: 3000 is that of account_port too"):
        hub(judge_port=3000)
    with pytest.raises(SettingsError, match="account_port: 3000 is that of metrics of the keeper"):
        hub(metrics_port=3003)


def test_slot_and_service_of_one_host_have_ports_of_their_own() -> None:
    both = ("coordinators", "workers")
    with pytest.raises(SettingsError, match="slot 1: swarm_port: 3001 is that of dashboard_port"):
        plan(both, account_host="192.0.2.1", slots=2, swarm_port=3000, account_port=4000)
    assert len(plan(both, account_host="192.0.2.1", slots=2, swarm_port=38000).slots) == 2


def test_address_that_two_slots_would_announce_is_named() -> None:
    address = "/ip4/192.0.2.1/tcp/38000"
    with pytest.raises(SettingsError) as refused:
        plan(slots=2, swarm_announce=[address])
    assert str(refused.value) == (
        f"inventory data of gpu-3: slot 1: swarm_announce: {address} is that of slot 0 too; give"
        " each its own in a list of slots, or set swarm_announce_interface"
    )
    assert list(clashes(plan(slots=1, swarm_announce=[address] * 2).slots, {})) == []


def test_anvil_is_installed_unless_the_inventory_names_another() -> None:
    assert hub().needs_anvil
    assert not hub(anvil_binary="/usr/local/bin/anvil").needs_anvil
    assert not plan(slots=1).needs_anvil


@pytest.mark.parametrize(
    ("slots", "has_trackers"),
    [([{}], False), ([{}, {"tracking_trackio": True}], True), ([{"tracking_wandb": "off"}], False)],
)
def test_trackers_are_installed_if_any_slot_uses_one(
    slots: list[dict[str, Any]], has_trackers: bool
) -> None:
    assert plan(slots=slots).has_trackers is has_trackers


def test_every_service_and_slot_has_a_settings_file() -> None:
    assert [str(file) for file in plan(slots=2).settings_files()] == [
        "/etc/hivewright/worker-0.yaml",
        "/etc/hivewright/worker-1.yaml",
    ]
    names = [file.name for file in hub().settings_files()]
    assert names == [f"{role}.yaml" for role in COORDINATOR_ROLES]

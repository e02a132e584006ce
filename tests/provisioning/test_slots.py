"""Slots: their GPUs, their share of the machine, and what is kept of removed ones."""

from pathlib import Path
from typing import Any

import pytest

from deploys import gpus
from deploys.gpus import Gpus
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry, HostPlan
from worker import settings
from worker.errors import SettingsError


def cards(num: int) -> Gpus:
    lines = [
        f"gpu {n}, GPU-{n}, NVIDIA GeForce RTX 4090, 24564, 8.9, 580.95.05" for n in range(num)
    ]
    return gpus.parse([*lines, "cuda 13.0"] if num else [])


def plan(**data: Any) -> HostPlan:
    return validation.check([HostEntry("gpu-3", ("workers",), {"swarm_enabled": False, **data})])[
        "gpu-3"
    ]


def uuids(on: HostPlan) -> list[str | None]:
    return [slot.card.uuid if slot.card else None for slot in on.slots]


def test_auto_is_one_slot_for_each_gpu_with_places_of_its_own() -> None:
    slots = plan(slots="auto", swarm_port=38000).on(cards(8)).slots
    assert [slot.number for slot in slots] == list(range(8))
    assert [slot.unit_settings() for slot in slots] == [
        f"[Service]\nEnvironment=CUDA_VISIBLE_DEVICES=GPU-{n}\n" for n in range(8)
    ]
    assert [slot.settings.swarm.port for slot in slots] == list(range(38000, 38008))
    assert (
        len(
            {slot.settings.node.state_dir for slot in slots}
            | {slot.settings.node.name for slot in slots}
        )
        == 16
    )
    assert [slot.settings for slot in slots] == [
        slot.settings for slot in plan(slots=8, swarm_port=38000).slots
    ]


@pytest.mark.parametrize(
    ("data", "num_cards", "expected"),
    [
        ({"slots": "auto"}, 0, [None]),
        ({"slots": "auto", "model_device": "cpu"}, 4, [None]),
        ({"slots": 2}, 0, [None, None]),
        ({"slots": 2}, 4, ["GPU-0", "GPU-1"]),
        (
            {"slots": [{}, {"gpu": 0}, {"model_device": "cpu"}, {}]},
            4,
            ["GPU-1", "GPU-0", None, "GPU-2"],
        ),
        ({"slots": [{"gpu": 1}, {"gpu": 1}]}, 2, ["GPU-1", "GPU-1"]),
        ({"slots": [{"model_device": "cuda:0"}, {}]}, 2, [None, "GPU-1"]),
    ],
)
def test_slots_get_the_gpus_that_they_name_or_the_next(
    data: dict[str, Any], num_cards: int, expected: list[str | None]
) -> None:
    assert uuids(plan(**data).on(cards(num_cards))) == expected


@pytest.mark.parametrize(
    ("data", "num_cards", "message"),
    [
        (
            {"slots": 4},
            2,
            (
                "slots: no GPU is left for slot 2, 3; the host has 2 GPUs, numbered from 0: take"
                " fewer slots (or auto), give those that share one the same gpu, or"
                " model_device cpu"
            ),
        ),
        (
            {"slots": [{"gpu": 2}, {"model_device": "cuda:7"}]},
            2,
            (
                "slot 0: gpu: got 2; the host has 2 GPUs, numbered from 0\n"
                "slot 1: model_device: got 'cuda:7'; the host has 2 GPUs, numbered from 0"
            ),
        ),
        (
            {"slots": "auto", "swarm_port": 65535},
            2,
            "slot 1: swarm_port: got 65536, counted up from slot 0's; expected at most 65535",
        ),
        (
            {"slots": "auto", "swarm_announce": ["/ip4/192.0.2.1/tcp/1"]},
            2,
            (
                "slot 1: swarm_announce: /ip4/192.0.2.1/tcp/1 is that of slot 0 too; give each its"
                " own in a list of slots, or set swarm_announce_interface"
            ),
        ),
        (
            {"slots": 1, "model_device": "cuda"},
            0,
            "slot 0: model_device: got 'cuda'; the host has no GPU; expected auto or cpu",
        ),
    ],
)
def test_slots_that_the_host_can_not_have_are_refused(
    data: dict[str, Any], num_cards: int, message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        plan(**data).on(cards(num_cards))
    assert str(refused.value) == message


def test_broken_driver_is_no_host_without_gpus() -> None:
    broken = gpus.parse(["problem Failed to initialize NVML: Driver/library version mismatch"])
    with pytest.raises(
        SettingsError,
        match=r"nvidia-smi says: Failed to initialize NVML.*or set model_device to cpu",
    ):
        plan(slots="auto").on(broken)
    assert uuids(plan(slots="auto", model_device="cpu").on(broken)) == [None]


def test_limits_of_the_host_hold_for_each_slot_that_says_nothing_else() -> None:
    slots = plan(slots=[{}, {"slot_memory_gb": 8.5}], slot_memory_gb=24.0, slot_cpus=3.5).slots
    assert slots[0].unit_settings() == "[Service]\nMemoryMax=24000000000\nCPUQuota=350%\n"
    assert slots[1].unit_settings() == "[Service]\nMemoryMax=8500000000\nCPUQuota=350%\n"


@pytest.mark.parametrize(
    ("key", "name", "data"),
    [
        ("hub_token_file", "hub.token", {"hub_repo": "me"}),
        ("tracking_wandb_key_file", "wandb.key", {"tracking_wandb": "online"}),
    ],
)
def test_secret_of_a_worker_is_roots_and_only_its_slot_gets_a_copy(
    tmp_path: Path, key: str, name: str, data: dict[str, Any]
) -> None:
    (tmp_path / "secret").write_text("example-secret\n")
    data = {**data, key: str(tmp_path / "secret")}
    for slots in (plan(slots=2, **data).slots, plan(slots="auto", **data).on(cards(2)).slots):
        for number, slot in enumerate(slots):
            there = f"/etc/hivewright/worker-{number}.{name}"
            assert f"LoadCredential={name}:{there}\n" in slot.unit_settings()
            place = f"/run/credentials/hivewright-worker@{number}.service/{name}"
            section, _, field = key.partition("_")
            assert str(getattr(getattr(slot.settings, section), field)) == place
            shown = slot.unit_settings() + repr(slot) + settings.dump(slot.settings)
            assert "example-secret" not in shown
            assert str(tmp_path) not in settings.dump(slot.settings)
    none, own = plan(slots=[{}, data]).slots
    assert (none.secrets, none.unit_settings()) == ({}, "")
    assert own.secrets == {key: tmp_path / "secret"}


def test_token_for_the_model_is_in_no_workers_settings_and_in_no_workers_unit(
    tmp_path: Path,
) -> None:
    (tmp_path / "token").write_text("hf_example\n")
    data = {"model_name": "owner/gated", "model_token_file": str(tmp_path / "token")}
    own = {"model_token_file": str(tmp_path / "token")}
    for slots in (
        plan(slots=2, **data).slots,
        plan(slots="auto", **data).on(cards(2)).slots,
        plan(slots=[own, own], model_name="owner/gated").slots,
    ):
        for slot in slots:
            assert slot.model_token == tmp_path / "token"
            assert slot.settings.model.token_file is None
            assert "LoadCredential" not in slot.unit_settings()
            assert "hf_example" not in slot.unit_settings() + repr(slot)
    none, one = plan(slots=[{}, own], model_name="owner/gated").slots
    assert (none.model_token, one.model_token) == (None, tmp_path / "token")

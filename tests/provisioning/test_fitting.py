"""Plans and the facts of their hosts: what is refused, and which build of torch a host gets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyinfra_hosts import current_host

from deploys import gpus
from deploys.facts import DamagedEnrolments, MovedAway
from deploys.gpus import Gpus
from deploys.hardware import Distribution, HostGpus, MissingParts, OwnPipSources, System
from deploys.inventory import fitting, validation
from deploys.inventory.host_plan import HostEntry, Planned
from deploys.inventory.torch_builds import CPU_INDEX
from deploys.pyinfra_ext import run_report
from worker.swarm import identity

INDEX = "https://download.pytorch.org/whl"


def cards(*rows: str, driver: str = "580.95.05", cuda: str = "13.0") -> Gpus:
    """Return GPUs from rows of NAME, MEMORY, CAPABILITY."""
    lines = [f"gpu {n}, GPU-{n}, {row}, {driver}" for n, row in enumerate(rows)]
    return gpus.parse([*lines, f"cuda {cuda}"])


ADA = "NVIDIA L4, 23034, 8.9"
PASCAL = "Tesla P100, 16280, 6.0"
FACTS: dict[type, Any] = {
    Distribution: System("debian", "bookworm", "x86_64"),
    MissingParts: None,
    DamagedEnrolments: [],
    MovedAway: {},
    HostGpus: Gpus(),
    OwnPipSources: False,
}


def planned(groups: tuple[str, ...] = ("workers",), /, **data: Any) -> Planned:
    of_worker = {"slots": 1, "swarm_enabled": False} if "workers" in groups else {}
    entry = HostEntry("gpu-1", groups, of_worker | data)
    plan = validation.check([entry])["gpu-1"]
    return Planned(plan, "https://git.example.org/h.git", "0" * 40, token=None)


def fitted(before: Planned, facts: dict[type, Any]) -> Planned:
    with current_host(FACTS | facts):
        return fitting.fit(before)


def test_host_without_gpus_trains_on_the_cpu() -> None:
    after = fitted(planned(slots=2), {})
    assert (after.unfit, after.torch_index) == (None, CPU_INDEX)
    assert [slot.card for slot in after.host.slots] == [None, None]


def test_slots_get_the_gpus_and_torch_is_for_those_in_use() -> None:
    """The old card, which the build for the new one does not run on, is not used."""
    found = cards(ADA, PASCAL)
    both = fitted(planned(slots="auto"), {HostGpus: found})
    assert [slot.card and slot.card.uuid for slot in both.host.slots] == ["GPU-0", "GPU-1"]
    assert both.torch_index == f"{INDEX}/cu126"
    one = fitted(planned(slots=1), {HostGpus: found})
    assert [slot.card and slot.card.uuid for slot in one.host.slots] == ["GPU-0"]
    assert one.torch_index == f"{INDEX}/cu130"


@pytest.mark.parametrize(
    ("data", "own_sources", "index"),
    [
        ({}, False, CPU_INDEX),
        ({}, True, None),
        ({"release_source": "wheelhouse"}, True, CPU_INDEX),
        ({"torch_index": "pip"}, False, None),
        ({"torch_index": f"{INDEX}/cu126"}, True, f"{INDEX}/cu126"),
    ],
)
def test_pip_of_the_host_is_asked_first_unless_the_inventory_decides(
    data: dict[str, Any], own_sources: bool, index: str | None
) -> None:
    assert fitted(planned(**data), {OwnPipSources: own_sources}).torch_index == index


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({MissingParts: "there is no apt-get"}, "gpu-1: there is no apt-get"),
        (
            {DamagedEnrolments: ["/a/enrolment.json", "/b/enrolment.json"]},
            "/a/enrolment.json, /b/enrolment.json: damaged; expected the JSON that enrolment wrote",
        ),
        (
            {MovedAway: {0: "Qm"}},
            "the key of slot 0 was set aside by a move (swarm.pem.moved in"
            " /var/lib/hivewright/worker-N)",
        ),
        (
            {HostGpus: Gpus(problem="nvidia-smi says: no")},
            "nvidia-smi says: no, or set model_device to cpu",
        ),
        (
            {HostGpus: cards(ADA, cuda="11.8", driver="520.1")},
            "driver 520.1 runs CUDA 11.8; torch",
        ),
    ],
)
def test_facts_that_contradict_the_plan_are_the_reason_to_refuse(
    facts: dict[type, Any], reason: str
) -> None:
    after = fitted(planned(), facts)
    assert after.unfit is not None
    assert after.unfit.startswith(reason)
    assert after.host.slots[0].card is None


def test_advice_after_a_move_names_the_host_and_its_slots() -> None:
    after = fitted(planned(slots=3), {MovedAway: {2: "Qm", 0: "Qn"}})
    assert "the key of slot 0, 2 was set aside" in str(after.unfit)
    assert "`hivewright fleet take-back INVENTORY --limit gpu-1`" in str(after.unfit)


@pytest.mark.parametrize(
    ("slots", "moved", "is_refused"),
    [(1, 0, True), (1, 1, False), (2, 1, True), ("auto", 7, True)],
)
def test_key_that_has_moved_matters_only_to_a_planned_slot(
    slots: int | str, moved: int, is_refused: bool
) -> None:
    after = fitted(planned(slots=slots), {MovedAway: {moved: "Qm"}})
    assert (after.unfit is not None) is is_refused


def test_slot_that_gets_its_key_from_the_operator_may_have_lost_one(tmp_path: Path) -> None:
    key = tmp_path / "swarm.pem"
    identity.create(key)
    with_key = planned(slots=[{"identity": str(key)}])
    assert fitted(with_key, {MovedAway: {0: "Qm"}}).unfit is None


@pytest.mark.parametrize(
    ("machine", "data", "is_refused"),
    [
        ("x86_64", {}, False),
        ("aarch64", {}, True),
        ("aarch64", {"anvil_binary": "/usr/local/bin/anvil"}, False),
    ],
)
def test_coordinator_needs_a_chain_for_its_machine(
    machine: str, data: dict[str, Any], is_refused: bool
) -> None:
    hub = planned(("coordinators",), account_host="192.0.2.1", **data)
    after = fitted(hub, {Distribution: System("debian", "bookworm", machine)})
    assert (after.unfit is not None) is is_refused
    if after.unfit:
        assert f"and this host is {machine}: make another host the coordinator" in after.unfit


def test_gpus_of_a_coordinator_are_not_asked_for() -> None:
    hub = planned(("coordinators",), account_host="192.0.2.1")
    facts = {fact: value for fact, value in FACTS.items() if fact is not HostGpus}
    with current_host(facts):
        assert fitting.fit(hub).torch_index == CPU_INDEX


@pytest.mark.parametrize(
    ("found", "rest"),
    [
        (Gpus(warning="one is dead"), "its slots train on the CPU"),
        (replace(cards(ADA), warning="one is dead"), "the other GPUs are used"),
    ],
)
def test_card_that_cannot_be_used_is_noted(
    found: Gpus, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(run_report, "note", notes.append)
    assert fitted(planned(), {HostGpus: found}).unfit is None
    assert notes == [f"gpu-1: one is dead; {rest}"]

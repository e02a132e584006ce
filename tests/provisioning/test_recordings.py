"""GPUs of odd machines, from recordings of nvidia-smi (recordings/, each names its source).

A shell script prints the recording. Facts, placement and table are real.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploys.fleet.status import status_table
from deploys.fleet_facts import HostStates
from deploys.gpus import WSL_LIB, Gpus
from deploys.hardware import HostGpus
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry, HostPlan
from worker.errors import SettingsError

RECORDINGS = Path(__file__).parent / "recordings"
MIG = "feb88891-0000-0000-0000-00000000000"


def play(recording: str, folder: Path) -> None:
    """Make an nvidia-smi in `folder` that answers as recorded, and refuses unknown fields."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for number, section in enumerate(
        re.split(r"^\$ ?", (RECORDINGS / recording).read_text(), flags=re.M)[1:]
    ):
        asked, _, answer = section.partition("\n")
        code = re.search(r"^exit (\d+)\n", answer, re.M)
        (folder / f"answer-{number}").write_text(re.sub(r"^exit \d+\n", "", answer, flags=re.M))
        pattern = f'"{asked}"*' if asked.startswith("-") else '""'
        cases.append(f"{pattern}) cat {folder}/answer-{number}; exit {code[1] if code else 0};;")
    # Its options come in either order.
    asked = '"$(echo "$*" | sed "s/--format=[^ ]* *//")"'
    script = "\n".join(["#!/bin/sh", f"case {asked} in", *cases, "esac"])
    (folder / "nvidia-smi").write_text(
        f"{script}\necho Field is not a valid field to query; exit 2\n"
    )
    (folder / "nvidia-smi").chmod(0o755)


def ask(fact: Any, folder: Path) -> Any:
    """Ask a fact through a real shell; WSL2's folder and device are in `folder`."""
    script = (
        fact.command()
        .replace(WSL_LIB, str(folder / "wsl"))
        .replace("/dev/dxg", str(folder / "dxg"))
    )
    environment = os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env=environment,
    )
    return fact.process(done.stdout.splitlines()) if done.stdout else fact.default()


def found(recording: str, folder: Path) -> Gpus:
    play(recording, folder)
    gpus: Gpus = ask(HostGpus(), folder)
    return gpus


def plan(**data: Any) -> HostPlan:
    return validation.check([HostEntry("gpu-3", ("workers",), {"swarm_enabled": False, **data})])[
        "gpu-3"
    ]


def test_every_recording_says_what_it_was_written_from() -> None:
    for file in RECORDINGS.iterdir():
        assert re.match(r"# .*\n# Written from: ", file.read_text()), file


def test_each_slice_of_a_partitioned_card_is_a_slot_and_a_card_without_slices_is_named(
    tmp_path: Path,
) -> None:
    gpus = found("a100-mig.txt", tmp_path)
    assert list(gpus.by_number) == ["0:0", "0:1", "0:2", 1]
    assert [card.memory_mib for card in gpus.cards] == [40960, 10240, 20480, 81920]
    assert {card.capability for card in gpus.cards} == {(8, 0)}
    assert "GPU 2 (NVIDIA A100-SXM4-80GB) is in MIG mode and has no slice" in str(gpus.warning)
    slots = plan(slots="auto").on(gpus).slots
    visible = [
        slot.unit_settings().partition("CUDA_VISIBLE_DEVICES=")[2].split()[0] for slot in slots
    ]
    assert visible == [
        f"MIG-{MIG}0",
        f"MIG-{MIG}1",
        f"MIG-{MIG}2",
        "GPU-7fdaf0a5-0000-0000-0000-000000000001",
    ]
    (own,) = plan(slots=[{"gpu": "0:1"}]).on(gpus).slots
    assert own.card is not None
    assert own.card.uuid == f"MIG-{MIG}1"


def test_partitioned_card_is_never_taken_as_a_whole(tmp_path: Path) -> None:
    gpus = found("a100-mig.txt", tmp_path)
    numbered = r"the host has 4 GPUs and slices \(MIG\), numbered 0:0, 0:1, 0:2, 1"
    for slot in ({"gpu": 0}, {"gpu": "1:0"}, {"gpu": 2}, {"model_device": "cuda:0"}):
        with pytest.raises(SettingsError, match=numbered):
            plan(slots=[slot]).on(gpus)
    with pytest.raises(SettingsError, match=r"gpu: got '1:x'; expected .*the number of a GPU"):
        plan(slots=[{"gpu": "1:x"}])


def test_slices_of_old_drivers_have_ids_too(tmp_path: Path) -> None:
    (card,) = found("a100-mig-old-driver.txt", tmp_path).cards
    assert card.uuid == "MIG-GPU-63feeb45-0000-0000-0000-000000000000/1/0"


@pytest.mark.parametrize(
    ("recording", "said"),
    [("h100-lost-card.txt", "GPU3: 0000:5E:00.0"), ("h100-error-card.txt", "3, [Unknown Error]")],
)
def test_dead_card_costs_the_others_nothing_and_is_named(
    recording: str, said: str, tmp_path: Path
) -> None:
    gpus = found(recording, tmp_path)
    assert list(gpus.by_number) == [0, 1, 2, 4, 5, 6, 7]
    assert (said in str(gpus.warning), gpus.driver_cuda) == (True, (13, 0))


@pytest.mark.parametrize(
    ("recording", "said"),
    [("h100-lost-card.txt", "GPU3: 0000:5E:00.0"), ("h100-error-card.txt", "3, GPU-3, ERR!")],
)
def test_dead_card_is_a_line_of_fleet_status_and_no_gpu_at_zero(
    recording: str, said: str, tmp_path: Path
) -> None:
    play(recording, tmp_path)
    state = ask(HostStates(), tmp_path)
    assert [card["index"] for card in state["gpus"]] == [0, 1, 2, 4, 5, 6, 7]
    _, notes, is_well = status_table(
        {"gpu-1": []}, {"gpu-1": state | {"commit": "a", "deployed": "b"}}, {"gpu-1": []}, 0, 80
    )
    assert not is_well
    assert any(line.startswith("gpu-1: nvidia-smi: ") and said in line for line in notes)


def test_card_without_memory_of_its_own_has_the_machines(tmp_path: Path) -> None:
    (card,) = found("gb10.txt", tmp_path).cards
    assert card.memory_mib > 0
    state = ask(HostStates(), tmp_path)
    assert (state["gpus"][0]["memory_total"], state["gpus"][0]["use"], state["problem"]) == (
        None,
        12,
        None,
    )


def test_gpu_of_wsl2_is_found_and_its_unit_reaches_it(tmp_path: Path) -> None:
    play("wsl2.txt", tmp_path / "wsl")
    (tmp_path / "dxg").touch()
    gpus = ask(HostGpus(), tmp_path)
    (slot,) = plan(slots="auto").on(gpus).slots
    for text in (slot.unit_settings(), slot.enrol_settings()):
        assert text == (
            "[Service]\nEnvironment=CUDA_VISIBLE_DEVICES=GPU-bbbb\n"
            "Environment=LD_LIBRARY_PATH=/usr/lib/wsl/lib\nDeviceAllow=/dev/dxg rw\n"
        )
    assert ask(HostStates(), tmp_path)["gpus"][0]["memory_used"] == 1337


def test_wsl2_without_a_driver_is_named(tmp_path: Path) -> None:
    (tmp_path / "dxg").touch()
    gpus = ask(HostGpus(), tmp_path)
    assert "install its driver in Windows" in str(gpus.warning)
    with pytest.raises(SettingsError, match="the host has no GPU"):
        plan(slots=1, model_device="cuda").on(gpus)


def test_driver_that_was_upgraded_is_a_problem(tmp_path: Path) -> None:
    assert "Driver/library version mismatch" in str(found("driver-mismatch.txt", tmp_path).problem)
    assert "Driver/library version mismatch" in ask(HostStates(), tmp_path)["problem"]


def test_ill_cards_of_a_host_are_named_with_what_to_do(tmp_path: Path) -> None:
    own = Path(__file__).parents[1] / "runtime/recordings"
    health = (own / "rtx4090-smi-q.txt").read_text().replace(": No\n", ": Yes\n", 1)
    kernel = (own / "xid-lines.txt").read_text()
    (tmp_path / "health").write_text(health)
    (tmp_path / "kernel").write_text(kernel)
    (tmp_path / "nvidia-smi").write_text(
        f'#!/bin/sh\ncase "$*" in -q) cat {tmp_path}/health;; *memory.used*)'
        " echo '0, GPU-0, 1, 2, 3';; esac\n"
    )
    (tmp_path / "journalctl").write_text(f"#!/bin/sh\ncat {tmp_path}/kernel\n")
    for name in ("nvidia-smi", "journalctl"):
        (tmp_path / name).chmod(0o755)
    state = ask(HostStates(), tmp_path)
    reset, fallen, asks, lost = state["ill"]
    assert reset.startswith("GPU 0000:01:00 (NVIDIA GeForce RTX 4090): it must be reset; reset it")
    assert "GPU 0000:04:00 (not listed): the kernel says Xid 79" in fallen
    assert "Xid 154" in asks
    assert "GPU 0000:b3:00" in lost
    _, notes, is_well = status_table(
        {"gpu-1": []}, {"gpu-1": state | {"commit": "a", "deployed": "b"}}, {"gpu-1": []}, 0, 80
    )
    assert not is_well
    assert any(
        line.startswith("gpu-1: GPU 0000:04:00 (not listed): the kernel says Xid 79")
        for line in notes
    )

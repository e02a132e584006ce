"""A device that computes, and GPUs that are missing, too old, too new, or broken."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from worker.errors import ModelError
from worker.policy import device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretend that torch sees GPUs with these properties."""
    card = SimpleNamespace(
        count=1, capability=(8, 9), archs=["sm_80", "sm_86", "sm_90a"], uuid="1234"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: card.count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card.capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: card.archs)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: card)
    return card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpu_computes_known_numbers(dtype: str) -> None:
    name, seconds = device.compute("cpu", dtype)
    assert name == "CPU"
    assert seconds >= 0


def test_device_that_computes_wrong_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *a, **k: eye(*a, **k) * 1.01)
    with pytest.raises(ModelError) as refused:
        device.compute("cpu", "float32")
    assert str(refused.value) == (
        "CPU (cpu): computes wrong numbers; don't train on it, set model.device to another"
    )


def test_failure_of_the_driver_is_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(ModelError) as refused:
        device.compute("cpu", "float32")
    assert "fails there: CUDA error: unspecified launch failure; see `nvidia-smi`" in str(
        refused.value
    )
    assert "might be" not in str(refused.value)


def test_build_of_torch_without_gpus_is_named(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.count = 0
    monkeypatch.setattr(device, "UVM", tmp_path / "uvm")
    monkeypatch.setattr(device, "DXG", tmp_path / "dxg")
    with pytest.raises(ModelError) as refused:
        device.compute("cuda:0", "float32")
    assert f"sees no GPU; {tmp_path}/uvm is missing: run `nvidia-modprobe -u -c 0`" in str(
        refused.value
    )
    (tmp_path / "dxg").touch()
    assert device.missing_files() == ""


def test_number_of_a_gpu_that_is_not_there_is_named(gpu: SimpleNamespace) -> None:
    gpu.count = 2
    with pytest.raises(ModelError, match=r"cuda:2: torch sees 2 GPUs; set model\.device to one of"):
        device.compute("cuda:2", "float32")


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 1), ["sm_120"], True),
        ((12, 0), ["sm_90"], False),
        ((6, 1), ["sm_70", "compute_60"], False),
        ((6, 1), [], True),
    ],
)
def test_build_fits_a_card_of_its_major_architecture(
    gpu: SimpleNamespace, capability: tuple[int, int], archs: list[str], fits: bool
) -> None:
    gpu.capability, gpu.archs = capability, archs
    if fits:
        assert device._require_build(torch.device("cuda:0")) == "Card 0"
        return
    with pytest.raises(ModelError) as refused:
        device._require_build(torch.device("cuda"))
    assert f"Card 0: is sm_{capability[0]}{capability[1]}, and torch" in str(refused.value)
    assert f"is built for {', '.join(archs)}; install a build that has it" in str(refused.value)


@pytest.mark.parametrize(
    ("where", "uuid", "expected"),
    [
        ("cpu", "1234", None),
        ("cuda:0", "1234", "GPU-1234"),
        ("cuda:0", "GPU-1234", "GPU-1234"),
        ("cuda:0", "MIG-1234", "MIG-1234"),
    ],
)
def test_id_of_a_card_is_as_nvidia_smi_has_it(
    gpu: SimpleNamespace, where: str, uuid: str, expected: str | None
) -> None:
    gpu.uuid = uuid
    assert device.gpu_uuid(where) == expected


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        ("0, GPU-0, 70123, 98", []),
        ("0, GPU-0, [N/A], [N/A]", []),
        ("  1, GPU-1, ERR!, 0  ", ["1, GPU-1, ERR!, 0"]),
        (
            "0, GPU-0, 1, 2\\n1, GPU-1, [GPU requires reset], 0",
            ["1, GPU-1, [GPU requires reset], 0"],
        ),
        ("GPU is lost. Reboot\\377", ["GPU is lost. Reboot\ufffd"]),
        ("", []),
    ],
)
def test_lines_about_broken_cards_are_found(
    said: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, f"#!/bin/sh\nprintf '{said}\\n' >&2\nexit 9\n", monkeypatch)
    assert device.sick_cards() == lines


def test_program_that_is_missing_or_can_t_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, "\x7fELF of another machine", monkeypatch)
    assert device.sick_cards() == ["nvidia-smi can't be run: Exec format error"]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert device.sick_cards() == []

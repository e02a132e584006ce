"""Tests that a worker with an assigned GPU never trains on the CPU instead."""

import pytest
import torch

from worker import settings
from worker.commands import doctor
from worker.errors import ResourceError
from worker.policy import device, model_sizing


@pytest.mark.parametrize("given", ["GPU-1234", "MIG-1234", "0"])
def test_gpu_that_is_gone_stops_the_worker(given, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=f"CUDA_VISIBLE_DEVICES is {given}") as error:
        model_sizing.measure(settings.Model(device="auto"))
    assert error.value.exit_code == 4
    assert model_sizing.chosen_device(settings.Model(device="cpu")) == "cpu"


@pytest.mark.parametrize("given", ["", "-1"])
def test_no_gpu_on_purpose_is_the_cpu(given, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_sizing.chosen_device(settings.Model(device="auto")) == "cpu"


def test_missing_device_file_is_named_with_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "UVM", tmp_path / "nvidia-uvm")
    with pytest.raises(
        ResourceError, match=r"nvidia-uvm is missing: run `nvidia-modprobe -u -c 0`"
    ):
        model_sizing.measure(settings.Model(device="auto"))
    (tmp_path / "nvidia-uvm").touch()
    with pytest.raises(ResourceError) as error:
        model_sizing.measure(settings.Model(device="auto"))
    assert "is missing" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "sick"),
    [
        ("0, GPU-0, 70123, 98\n3, GPU-3, ERR!, ERR!", ["3, GPU-3, ERR!, ERR!"]),
        ("Unable to determine the device handle for GPU3: Unknown Error", 1),
        ("0, GPU-0, [N/A], [N/A]", []),
    ],
)
def test_doctor_names_a_dead_card(said, sick, tmp_path, monkeypatch):
    """Replace nvidia-smi by a script that prints the lines from reports of such machines."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s\\n' '{said}'\nexit 15\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = device.sick_cards()
    assert found == sick if isinstance(sick, list) else len(found) == sick
    checked = settings.from_flat({"node_state_dir": str(tmp_path), "model_device": "cpu"}, "test")
    shown = [
        each
        for each in doctor.examine(checked)
        if (each.check, each.verdict) == ("device", "warning") and "does not work" in each.cause
    ]
    assert len(shown) == len(found)

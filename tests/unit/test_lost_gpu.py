"""A worker that was given a GPU never trains on the CPU in its place."""

import pytest
import torch

from worker import settings
from worker.errors import ResourceError
from worker.policy import choice


@pytest.mark.parametrize("given", ["GPU-1234", "MIG-1234", "0"])
def test_gpu_that_is_gone_stops_the_worker(given, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=f"CUDA_VISIBLE_DEVICES is {given}") as error:
        choice.measure(settings.Model(device="auto"))
    assert error.value.exit_code == 4
    assert choice.chosen_device(settings.Model(device="cpu")) == "cpu"


@pytest.mark.parametrize("given", ["", "-1"])
def test_no_gpu_on_purpose_is_the_cpu(given, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choice.chosen_device(settings.Model(device="auto")) == "cpu"

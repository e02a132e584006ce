"""The figures that a node's health is judged by, where they come from."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from worker import condition, settings
from worker.runtime import host_memory
from worker.runtime.host_memory import HostMemory
from worker.telemetry.status import Condition
from worker.trainer.micro_batch import Budget


@pytest.mark.parametrize(
    ("budget", "tokens", "share", "recomputes"),
    [
        (Budget(4096), 4096, 1.0, False),
        (Budget(4096, full_tokens=4096), 4096, 1.0, False),
        (Budget(1024, full_tokens=4096), 1024, 0.25, False),
        (Budget(8192, full_tokens=4096), 8192, 1.0, False),
        (Budget(1024, recomputes=True), 1024, 1.0, False),
        (Budget(1024, recomputes=True, full_tokens=1024), 1024, 1.0, True),
        (Budget(1024, recomputes=True, full_tokens=1024, full_recomputes=True), 1024, 1.0, False),
    ],
)
def test_budget_is_compared_with_the_measured_one(budget, tokens, share, recomputes):
    found = Condition()
    condition.see_budget(found, budget)
    assert found.training_tokens == tokens
    assert found.training_share == share
    assert found.recomputes == recomputes


@pytest.mark.parametrize(
    ("free_bytes", "spare"),
    [(2_500_000_000, 1500), (1_000_000_000, 0), (999_999_999, -1), (0, -1000)],
)
def test_spare_disk_is_what_is_beyond_the_settings(tmp_path, monkeypatch, free_bytes, spare):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    node = settings.Node(state_dir=tmp_path, min_free_disk_mb=1000)
    assert condition.spare_mb(node) == spare


def test_host_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "read", lambda: HostMemory(5, 10, 0.25))
    found = Condition()
    condition.see_host(found, settings.Node(state_dir=tmp_path / "gone", min_free_disk_mb=1))
    assert (found.disk_spare_mb, found.ram_available_mb, found.memory_stalled) == (None, 5, 0.25)


def policy_with(engine: object, is_plain: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(dtype=torch.bfloat16),
        template=SimpleNamespace(is_plain=is_plain),
        answers_share=0.5,
        engine=engine,
    )


def test_policy_without_an_engine_yet_has_its_precision():
    found = Condition()
    condition.see_policy(found, policy_with(None, is_plain=True))
    assert (found.precision, found.engine, found.setbacks) == ("bfloat16", None, {})
    assert (found.template, found.answers_share) == ("no chat template", 0.5)


def test_setbacks_are_grouped_by_what_they_are_of():
    setbacks = [
        SimpleNamespace(of="engine", reason="no vLLM"),
        SimpleNamespace(of="precision", reason="no bfloat16"),
        SimpleNamespace(of="engine", reason="no graphs"),
    ]
    found = Condition()
    condition.see_policy(found, policy_with(SimpleNamespace(name="torch", setbacks=setbacks)))
    assert found.engine == "torch"
    assert found.template == "its own chat template"
    assert found.setbacks == {
        "engine": ("no vLLM", "no graphs"),
        "precision": ("no bfloat16",),
    }
    condition.see_policy(found, policy_with(SimpleNamespace(name="torch", setbacks=[])))
    assert found.setbacks == {}

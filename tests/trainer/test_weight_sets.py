"""Sets of weights: averaged, tried and adopted, on the small model."""

import copy
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from worker import settings
from worker.policy.policy import Policy, load
from worker.trainer import checkpoint, weight_sets
from worker.trainer.trainer import Trainer


@pytest.fixture(scope="module")
def pristine() -> Policy:
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


def make_trainer(pristine: Policy, dtype: torch.dtype = torch.float32) -> Trainer:
    policy = Policy(copy.deepcopy(pristine.model).to(dtype), pristine.tokenizer, pristine.name)
    trainer = Trainer(policy, settings.Trainer(), settings.Generation())
    for master in trainer.masters:  # a step: the optimizer has moments, masters are between bits
        master.grad = torch.full_like(master, 0.1)
    trainer.optimizer.step()
    trainer.copy_masters()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_weights_come_back_bit_by_bit(pristine: Policy, dtype: torch.dtype) -> None:
    trainer = make_trainer(pristine, dtype)
    masters = [master.clone() for master in trainer.masters]
    weights = [parameter.clone() for parameter in trainer.parameters.values()]
    others = {name: torch.zeros_like(p) for name, p in trainer.parameters.items()}
    with suppress(ValueError), weight_sets.tried(trainer, others):
        assert not any(p.any() for p in trainer.parameters.values())
        raise ValueError("a trial that fails")
    assert all(map(torch.equal, trainer.masters, masters))
    assert all(map(torch.equal, trainer.parameters.values(), weights))


def test_adopted_weights_begin_without_moments_and_are_saved(
    pristine: Policy, tmp_path: Path
) -> None:
    trainer = make_trainer(pristine)
    trainer.steps = 1
    others = {name: 2 * w for name, w in weight_sets.current(trainer).items()}
    weight_sets.adopt(trainer, others)
    assert not any(m.any() for state in trainer.optimizer.state.values() for m in state.values())
    checkpoint.save(tmp_path, trainer, {"round": 1}, keep=1)
    restored = make_trainer(pristine)
    assert checkpoint.restore(tmp_path, restored) == {"round": 1}
    assert all(torch.equal(p, others[name]) for name, p in restored.parameters.items())


def test_average_keeps_types_and_weighs_all_alike() -> None:
    sets = [{"a": torch.full((2,), value, dtype=torch.bfloat16)} for value in (1.0, 2.0, 6.0)]
    mean = weight_sets.average(sets)
    assert mean["a"].dtype == torch.bfloat16
    assert mean["a"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("value", "fits"), [(1.0, True), (math.nan, False), (math.inf, False), (1e5, False)]
)
def test_odd_values_do_not_fit(pristine: Policy, value: float, fits: bool) -> None:
    trainer = make_trainer(pristine)
    weights = weight_sets.current(trainer)
    next(iter(weights.values())).view(-1)[0] = value
    assert (weight_sets.find_misfit(trainer, weights) is None) is fits

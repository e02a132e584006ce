import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.groups import scored_group
from worker import settings
from worker.errors import ModelError, ResourceError
from worker.policy import memory, memory_shortage
from worker.policy.policy import Policy, load
from worker.records import Task
from worker.trainer import micro_batch
from worker.trainer.micro_batch import Budget
from worker.trainer.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
GENERATION = settings.Generation(num_generations=4, max_prompt_length=16, max_completion_length=32)


@pytest.fixture(scope="module")
def pristine():
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


def make_trainer(pristine, **options) -> Trainer:
    policy = Policy(copy.deepcopy(pristine.model), pristine.tokenizer, pristine.name)
    return Trainer(policy, settings.Trainer(**{"learning_rate": 1e-3, **options}), GENERATION)


def make_groups(num_groups=3):
    return [
        scored_group(
            Task("basic_arithmetic", "0" * 12, 0, i),
            f"Calculate {i} + 3.",
            ("",) * 4,
            (1.0, 0.0, 0.25, 0.0),
            token_ids=tuple(tuple(range(5 + i, 15 + i + 4 * n)) for n in range(4)),
            truncated=(False,) * 4,
        )
        for i in range(num_groups)
    ]


def weights(trainer):
    return [p.detach().clone() for p in trainer.policy.model.parameters()]


def fail_over(monkeypatch, trainer, limit, error):
    """Inject a fault at allocation: passes over more than `limit` tokens raise `error`."""
    real = trainer._scorer.logprobs_and_entropies
    passes = []

    def logprobs(groups, temperature):
        tokens = sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)
        passes.append(tokens)
        result = real(groups, temperature)
        if tokens > limit(trainer):
            raise error
        return result

    monkeypatch.setattr(trainer._scorer, "logprobs_and_entropies", logprobs)
    return passes


ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    " tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        ALLOCATOR,
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_step_that_runs_out_of_memory_is_made_in_smaller_pieces_with_the_same_result(
    pristine, monkeypatch, caplog, error
):
    whole, small = make_trainer(pristine), make_trainer(pristine)
    expected = whole.step(make_groups())
    passes = fail_over(monkeypatch, small, lambda _: 80, error)
    observed = small.step(make_groups())
    assert max(passes) > 80
    assert small.budget.tokens <= 80
    assert small.budget.recomputes is False
    assert "out of memory; repeating the step with a lower token budget" in caplog.text
    assert observed.loss == pytest.approx(expected.loss, abs=1e-6)
    assert observed.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for ours, theirs in zip(weights(small), weights(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    passes.clear()
    small.step(make_groups())
    assert max(passes) <= 80  # it learnt from the first time


def test_layers_are_computed_twice_only_when_one_sequence_does_not_fit(pristine, monkeypatch):
    trainer, whole = make_trainer(pristine), make_trainer(pristine)
    fail_over(monkeypatch, trainer, lambda t: 10_000 if t._scorer.recomputes else 20, ALLOCATOR)
    expected, observed = whole.step(make_groups()), trainer.step(make_groups())
    assert trainer.budget.recomputes is True
    assert trainer.budget.tokens < 100
    assert observed.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_sequence_that_never_fits_is_a_resource_error_and_keeps_the_weights(pristine, monkeypatch):
    trainer = make_trainer(pristine)
    before = weights(trainer)
    fail_over(monkeypatch, trainer, lambda _: 5, ALLOCATOR)
    with pytest.raises(
        ResourceError,
        match=r"out of memory on a single sequence of \d+ tokens .*can't allocate memory",
    ):
        trainer.step(make_groups())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(pristine, monkeypatch):
    trainer = make_trainer(pristine)
    fail_over(monkeypatch, trainer, lambda _: 5, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.step(make_groups())


def test_budget_is_measured_by_a_real_step_that_changes_nothing(pristine, tmp_path, monkeypatch):
    trainer = make_trainer(pristine)
    passes = fail_over(monkeypatch, trainer, lambda _: 10_000, ALLOCATOR)
    before, random_state = weights(trainer), torch.get_rng_state()
    trainer.fit(tmp_path / "budget.json")
    assert set(passes) == {GENERATION.max_prompt_length + GENERATION.max_completion_length}
    assert trainer.budget == Budget(16384)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert (trainer.steps, trainer.optimizer.state_dict()["state"]) == (0, {})
    assert all(p.grad is None for p in trainer.parameters.values())


def test_measured_budget_is_remembered_until_something_changes(pristine, tmp_path, monkeypatch):
    file = tmp_path / "budget.json"
    first = make_trainer(pristine)
    first.fit(file)
    fail_over(monkeypatch, first, lambda _: 80, ALLOCATOR)
    first.step(make_groups())
    second = make_trainer(pristine)
    passes = fail_over(monkeypatch, second, lambda _: 10_000, ALLOCATOR)
    second.fit(file)
    assert second.budget == first.budget
    assert second.budget.tokens <= 80
    assert passes == []
    other = make_trainer(pristine, max_tokens_per_micro_batch=1000)
    other.fit(file)
    assert other.budget == Budget(1000)


def test_worker_that_was_killed_for_its_memory_takes_less_each_time(pristine, tmp_path, caplog):
    file = tmp_path / "budget.json"

    def next_life():
        trainer = make_trainer(pristine)
        trainer.fit(file, was_killed=True)
        return trainer

    make_trainer(pristine).fit(file)
    assert next_life().budget == Budget(8192)
    for _ in range(7):
        last = next_life()
    longest = GENERATION.max_prompt_length + GENERATION.max_completion_length
    assert last.budget == Budget(64)
    assert next_life().budget == Budget(32)
    assert 32 <= longest < 64
    last = next_life()
    assert (last.budget, last._scorer.recomputes) == (Budget(32, recomputes=True), True)
    assert next_life().budget == Budget(32, recomputes=True)
    assert "micro-batch is already minimal: raise its memory" in caplog.text


def test_measuring_that_cost_the_process_its_life_is_not_tried_again(
    pristine, tmp_path, monkeypatch
):
    monkeypatch.setattr(micro_batch, "measure", lambda *_: pytest.fail("measured again"))
    trainer = make_trainer(pristine)
    trainer.fit(tmp_path / "budget.json", was_killed=True)
    longest = GENERATION.max_prompt_length + GENERATION.max_completion_length
    assert (trainer.budget, trainer._scorer.recomputes) == (Budget(longest, recomputes=True), True)
    trainer.fit(tmp_path / "budget.json")
    assert trainer.budget == Budget(longest, recomputes=True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"key": "KEY", "tokens": 0, "recomputes": false}', "\udc80"]
)
def test_damaged_budget_is_measured_again(pristine, tmp_path, text, caplog, monkeypatch):
    trainer = make_trainer(pristine)
    # With the memory of this machine, which other tests use, too, the result would vary.
    monkeypatch.setattr(micro_batch, "measure", lambda *_: micro_batch.Measured(480, 10**9))
    key = micro_batch.describe(trainer.policy, trainer._settings, GENERATION)
    file = tmp_path / "budget.json"
    file.write_bytes(text.replace("KEY", key).encode(errors="surrogateescape"))
    trainer.fit(file)
    assert trainer.budget == Budget(16384)
    assert "measuring it again" in caplog.text
    written = json.loads(file.read_text())
    assert (written["key"], written["tokens"], written["recomputes"]) == (key, 16384, False)
    assert written["held"] > 0


@pytest.mark.parametrize(
    ("needed", "available", "expected"),
    [
        (480, 10**9, Budget(16384)),  # ten bytes a token
        (480, 100_000, Budget(8192)),
        (480, 3000, Budget(256)),
        (480, 481, Budget(32)),  # a micro-batch holds at least one sequence, whatever the budget
    ],
)
def test_budget_is_the_limit_halved_until_it_fits(
    pristine, monkeypatch, needed, available, expected
):
    trainer = make_trainer(pristine)
    reserve = 8 * sum(p.numel() for p in trainer.policy.model.parameters())  # for Adam's moments
    monkeypatch.setattr(
        micro_batch, "measure", lambda *_: micro_batch.Measured(needed, available + reserve)
    )
    assert trainer._measure_budget() == expected


def test_model_whose_training_does_not_fit_is_a_model_error(pristine, monkeypatch):
    trainer = make_trainer(pristine)
    fail_over(monkeypatch, trainer, lambda _: 5, ALLOCATOR)
    with pytest.raises(
        ModelError, match=r"hivewright/tiny: training on one sequence of 48 tokens does not fit"
    ):
        trainer._measure_budget()


def test_memory_of_a_step_is_seen():
    kept = []

    def step():
        kept.append(torch.ones(25_000_000))
        for _ in range(20):
            torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        kept.clear()

    measured = micro_batch.measure(step, torch.device("cpu"))
    assert 90e6 < measured.needed < 200e6
    assert measured.available > 0


LIMITED = """
import logging, resource, sys
import torch
from worker import settings
from worker.policy import memory_shortage
from worker.policy.policy import load
from tests.groups import scored_group
from worker.records import Task
from worker.trainer.trainer import Trainer
torch.set_num_threads(1)
logging.basicConfig(stream=sys.stdout)
memory_shortage.PATIENCE_SECONDS = 0.1  # a lower limit looks like memory that others have taken
generation = settings.Generation(num_generations=4, max_completion_length=400)
def make():
    return Trainer(load(settings.Model(device="cpu", threads=1)), settings.Trainer(), generation)
def groups(length):
    token_ids = tuple(tuple(5 + 7 * n + k for k in range(length)) for n in range(4))
    rewards = (1.0, 0.0, 0.5, 0.0)
    return [
        scored_group(Task("x", "0" * 12, 0, i), f"Calculate {i} + 3.", ("",) * 4, rewards,
                    token_ids=token_ids, truncated=(False,) * 4)
        for i in range(3)
    ]
limited, free = make(), make()
limited.step(groups(3)), free.step(groups(3))  # starts threads and pools before the limit
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000, hard))
observed = limited.step(groups(400))
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
expected = free.step(groups(400))
ratio = observed.grad_norm / expected.grad_norm
print("RESULT", limited.budget.tokens, free.budget.tokens, ratio, observed.skipped)
"""


def test_real_lack_of_memory_halves_the_budget_and_the_step_is_the_same():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory; repeating the step with a lower token budget" in done.stdout
    _, tokens, free, ratio, skipped = done.stdout.splitlines()[-1].split()
    assert int(tokens) < 4800 < int(free)
    assert float(ratio) == pytest.approx(1, rel=1e-5)
    assert skipped == "None"


class Clock:
    """A clock that jumps hours, for the module that decides when to try more."""

    def __init__(self):
        self.hours = 0.0
        self.start = time.time()

    def time(self):
        return self.start + 3600 * self.hours


def test_budget_after_memory_kills_is_whole_again_within_a_day(pristine, tmp_path, monkeypatch):
    file, clock = tmp_path / "budget.json", Clock()
    monkeypatch.setattr(micro_batch.time, "time", clock.time)
    make_trainer(pristine).fit(file)
    for _ in range(3):
        killed = make_trainer(pristine)
        killed.fit(file, was_killed=True)
    assert killed.budget == Budget(2048)
    again = make_trainer(pristine)
    again.fit(file)
    assert again.budget == Budget(2048)  # not at once
    while again.budget.tokens < 16384 and clock.hours < 48:
        clock.hours += 1
        again._raise_budget()
    assert clock.hours <= 24
    assert micro_batch.load(file, again._budget_key) == Budget(16384)


def test_budget_of_a_node_that_was_killed_while_measuring_is_whole_within_a_day(
    pristine, tmp_path, monkeypatch
):
    file, clock = tmp_path / "budget.json", Clock()
    monkeypatch.setattr(micro_batch.time, "time", clock.time)
    make_trainer(pristine).fit(file, was_killed=True)
    clock.hours = 2.1
    node = make_trainer(pristine)
    node.fit(file)  # also in the next life
    assert node.budget == Budget(48)
    assert node._scorer.recomputes is False
    for _ in range(22):
        clock.hours += 1
        node._raise_budget()
    assert node.budget == Budget(16384)


def test_kill_right_after_more_was_tried_makes_the_next_try_later(pristine, tmp_path, monkeypatch):
    file, clock = tmp_path / "budget.json", Clock()
    monkeypatch.setattr(micro_batch.time, "time", clock.time)
    make_trainer(pristine).fit(file)
    waits = []
    for _ in range(4):
        node = make_trainer(pristine)
        node.fit(file, was_killed=True)
        waits.append(node.budget.wait / 3600)
        clock.hours += waits[-1]
        node._raise_budget()
        assert node.budget == Budget(16384)
        clock.hours += 0.1  # the step that it dies in
    assert waits == pytest.approx([2, 4, 8, 16])


def test_step_that_fails_for_others_memory_is_not_written_down(pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_shortage, "PATIENCE_SECONDS", 0.2)
    file, trainer = tmp_path / "budget.json", make_trainer(pristine)
    trainer.fit(file)
    free = 4 << 30
    monkeypatch.setattr(memory, "free", lambda device: free)
    monkeypatch.setattr(memory, "used", lambda device: 0)
    trainer.step(make_groups())
    fail_over(monkeypatch, trainer, lambda _: 80 if free < 1 << 30 else 10_000, ALLOCATOR)
    real = trainer._shortage.look

    def look():
        nonlocal free
        real()
        free = 1 << 29

    trainer._shortage.look = look
    assert trainer.step(make_groups()).skipped is None
    assert trainer.budget.tokens <= 80
    assert micro_batch.load(file, trainer._budget_key) == Budget(16384)

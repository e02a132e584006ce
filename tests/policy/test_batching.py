import itertools
import json
import logging
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from worker import settings
from worker.errors import ResourceError
from worker.policy import memory, memory_shortage
from worker.policy.engines.batching import Rows
from worker.policy.engines.engine import Sampled
from worker.policy.policy import Policy, load

GENERATION = settings.Generation(num_generations=6, max_completion_length=8, dtype="float32")
QUESTIONS = ["Calculate 2 + 3.", "Calculate ( 8 - -1 )."]
CPU = torch.device("cpu")
ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"
)


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


def make_policy(tiny):
    return Policy(tiny.model, tiny.tokenizer, tiny.name)


def fail_over(monkeypatch, policy, generation, limit, error):
    """Inject a fault at allocation: batches of more than `limit` rows raise `error`."""
    engine = policy._load_engine(generation)
    sizes = []
    if generation.engine == "transformers":
        real = engine._generate

        def generate(prompts, *rest):
            sizes.append(len(prompts))
            if len(prompts) > limit:
                raise error
            return real(prompts, *rest)

        monkeypatch.setattr(engine, "_generate", generate)
        return sizes
    real = engine.decoder.start

    def start(prompts, max_new_tokens):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise error
        return real(prompts, max_new_tokens)

    monkeypatch.setattr(engine.decoder, "start", start)
    return sizes


@pytest.mark.parametrize(
    "error", [ALLOCATOR, torch.OutOfMemoryError("CUDA out of memory."), MemoryError()]
)
def test_batch_that_runs_out_of_memory_is_made_in_pieces_with_the_same_answers(
    tiny, monkeypatch, caplog, error
):
    expected = tiny.generate(QUESTIONS, GENERATION, seed=4)
    policy = make_policy(tiny)
    sizes = fail_over(monkeypatch, policy, GENERATION, 4, error)
    observed = policy.generate(QUESTIONS, GENERATION, seed=4)
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert (tiny.answers_share, policy.answers_share) == (1.0, 0.25)
    assert "out of memory; generating in smaller batches rows=3 before=6" in caplog.text
    for ours, theirs in zip(
        (c for g in observed for c in g), (c for g in expected for c in g), strict=True
    ):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    sizes.clear()
    policy.generate(QUESTIONS, GENERATION, seed=5)
    assert sizes == [3, 3, 3, 3]  # it learnt from the first time


def test_reference_engine_makes_smaller_pieces_too(tiny, monkeypatch):
    generation = settings.Generation(
        num_generations=4, max_completion_length=4, engine="transformers"
    )
    policy = make_policy(tiny)
    sizes = fail_over(monkeypatch, policy, generation, 3, ALLOCATOR)
    groups = policy.generate(QUESTIONS, generation, seed=0)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert [len(group) for group in groups] == [4, 4]


def test_single_answer_that_does_not_fit_is_a_resource_error(tiny, monkeypatch):
    policy = make_policy(tiny)
    fail_over(monkeypatch, policy, GENERATION, 0, ALLOCATOR)
    with pytest.raises(
        ResourceError, match=r"on a single answer \(.*can't allocate memory\); free memory"
    ):
        policy.generate(QUESTIONS, GENERATION, seed=4)


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(tiny, monkeypatch):
    policy = make_policy(tiny)
    fail_over(monkeypatch, policy, GENERATION, 3, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        policy.generate(QUESTIONS, GENERATION, seed=4)


def test_what_fits_is_remembered_by_the_next_node_until_something_changes(
    tiny, monkeypatch, tmp_path
):
    file = tmp_path / "rows.json"
    first = make_policy(tiny)
    first.prepare(GENERATION, file)
    assert not file.exists()  # there is nothing to remember
    fail_over(monkeypatch, first, GENERATION, 4, ALLOCATOR)
    first.generate(QUESTIONS, GENERATION, seed=4)
    assert json.loads(file.read_text())["rows"] == 3
    second = make_policy(tiny)
    second.prepare(GENERATION, file)
    sizes = fail_over(monkeypatch, second, GENERATION, 100, ALLOCATOR)
    second.generate(QUESTIONS, GENERATION, seed=4)
    assert sizes == [3, 3, 3, 3]
    longer = GENERATION.model_copy(update={"max_completion_length": 9})
    third = make_policy(tiny)
    third.prepare(longer, file)
    assert third._rows.limit is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"key": "KEY", "rows": 0}', '{"key": "KEY"}', "\udc80"]
)
def test_damaged_memory_of_it_is_found_again(tmp_path, caplog, text):
    file = tmp_path / "rows.json"
    file.write_bytes(text.replace("KEY", "k").encode(errors="surrogateescape"))
    rows = Rows(CPU)
    rows.remember_in(file, "k")
    assert rows.limit is None
    assert "again path=" in caplog.text


def run(rows, num_rows, bytes_of_row):
    pieces = []

    def make(piece):
        pieces.append(len(piece))
        return [Sampled((row,), (0.0,), True) for row in piece]

    answers = rows.run(num_rows, lambda piece: len(piece) * bytes_of_row, make)
    assert [answer.token_ids[0] for answer in answers] == list(range(num_rows))
    return pieces


def test_piece_that_a_cpu_has_no_memory_for_is_not_tried(monkeypatch, caplog):
    monkeypatch.setattr(memory, "free", lambda device: 100 << 20)
    rows = Rows(CPU)
    assert run(rows, 16, bytes_of_row=1 << 20) == [16]
    assert rows.limit is None
    assert run(rows, 16, bytes_of_row=30 << 20) == [2] * 8
    assert rows.limit is None  # an estimate is made again each time
    assert "about 480 MiB are needed, 80 MiB are free" in caplog.text
    # One row is tried even if it seems too large, because the need is an estimate.
    assert run(rows, 3, bytes_of_row=1 << 40) == [1] * 3


def test_gpu_is_asked_and_not_estimated(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 0)
    assert run(Rows(torch.device("cuda", 0)), 16, bytes_of_row=1 << 40) == [16]


@pytest.mark.parametrize("name", ["lean", "cached"])
def test_estimate_is_at_least_what_a_batch_keeps(tiny, name):
    """Count the caches of the longest answers tensor by tensor."""
    from worker.policy.engines.decoder import LeanDecoder
    from worker.policy.engines.hf_decoder import CachedDecoder

    decoder = (
        LeanDecoder(tiny.model, torch.float32) if name == "lean" else CachedDecoder(tiny.model)
    )
    prompts = [[5] * 30, [5] * 30, [6] * 20]
    with torch.no_grad():
        batch, logits = decoder.start(prompts, 100)
    if name == "lean":
        tensors = [*batch._prompt_keys, *batch._prompt_values, *batch._keys, *batch._values]
    else:
        tensors = [t for layer in batch._cache.layers for t in (layer.keys, layer.values)]
    kept = sum(t.numel() * t.element_size() for t in [*tensors, logits])
    assert kept < decoder.bytes_needed(prompts, 100) < 100 * kept


def test_log_says_at_the_start_what_generates(tiny, caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        make_policy(tiny).prepare(GENERATION, tmp_path / "rows.json")
    assert (
        "generation engine=torch, lean decoder with native operations, torch.float32" in caplog.text
    )


def test_limit_rises_again_and_less_often_where_it_fails(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"key": "k", "rows": 1}))  # one shortage, years ago
    rows, real_limit, failures = Rows(torch.device("cuda", 0)), 5, []
    rows._shortage = Quiet()
    rows.remember_in(file, "k")

    def batch(number):
        def make(piece):
            if len(piece) > real_limit:
                failures.append(number)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return [Sampled((row,), (0.0,), True) for row in piece]

        assert len(rows.run(16, len, make)) == 16

    for number in range(200):
        batch(number)
    pauses = [b - a for a, b in itertools.pairwise(failures)]
    assert max(pauses) > 16
    assert len(failures) < 20
    real_limit = 100  # the memory is back
    for number in range(200, 600):
        batch(number)
    assert rows.limit is None
    assert not file.exists()


class Quiet:
    """A GPU without other users."""

    def look(self):
        pass

    def wait(self):
        return False

    def is_foreign(self):
        return False


TAKE = """
import sys
taken = bytearray(int(sys.argv[1]))
for i in range(0, len(taken), 4096): taken[i] = 1  # written, so it is real memory
print("taken", flush=True)
sys.stdin.buffer.raw.read(1)
del taken
sys.stdin.buffer.raw.read(1)
"""


def test_memory_that_another_program_takes_for_a_while_is_waited_for(monkeypatch, tmp_path, caplog):
    """Allocate memory in another process, on a machine with 400 MiB for both."""
    file, others = tmp_path / "rows.json", []

    def taken():
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in others]
        return sum(pages) * resource.getpagesize()

    monkeypatch.setattr(memory, "free", lambda device: max(0, (400 << 20) - taken()))
    monkeypatch.setattr(memory, "used", lambda device: 0)
    rows = Rows(CPU)
    rows.remember_in(file, "k")
    needs = 14 << 20  # 16 rows: 224 of 320 MiB
    assert run(rows, 16, needs) == [16]
    command = [sys.executable, "-c", TAKE, str(350 << 20)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, bufsize=0
    ) as other:
        assert other.stdout.readline() == b"taken\n"
        others.append(other.pid)
        assert run(rows, 2, 1 << 20) == [2]  # a few fit even now
        release = threading.Timer(1.0, other.stdin.write, [b"\n"])
        release.start()
        monkeypatch.setattr(
            memory_shortage, "PATIENCE_SECONDS", 120.0
        )  # however slow this machine is
        assert run(rows, 16, needs) == [16]
        release.join()
    assert "other programs have taken memory, waiting for it" in caplog.text
    assert rows.limit is None
    assert not file.exists()


def test_memory_that_stays_away_costs_one_wait_and_rows_return_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_shortage, "PATIENCE_SECONDS", 0.3)
    free = 400 << 20
    monkeypatch.setattr(memory, "free", lambda device: free)
    monkeypatch.setattr(memory, "used", lambda device: 0)
    rows = Rows(CPU)
    rows.remember_in(tmp_path / "rows.json", "k")
    assert run(rows, 16, 16 << 20) == [16]
    free = 60 << 20
    started = time.monotonic()
    assert run(rows, 16, 16 << 20) == [3] * 5 + [1]
    assert time.monotonic() - started < 2
    free = 400 << 20
    assert run(rows, 16, 16 << 20) == [16]
    assert not (tmp_path / "rows.json").exists()


def test_allocator_that_fails_while_others_have_the_memory_teaches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_shortage, "PATIENCE_SECONDS", 0.3)
    free = 400 << 20
    monkeypatch.setattr(memory, "free", lambda device: free)
    monkeypatch.setattr(memory, "used", lambda device: 0)
    rows = Rows(torch.device("cuda", 0))
    rows.remember_in(tmp_path / "rows.json", "k")
    run(rows, 16, 1)
    free = 60 << 20

    def make(piece):
        if len(piece) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [Sampled((row,), (0.0,), True) for row in piece]

    assert len(rows.run(16, len, make)) == 16
    assert rows.limit == 4
    assert not (tmp_path / "rows.json").exists()

import copy
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import preloaded
from tests.groups import scored_group
from worker import environments, settings
from worker.environments.presets import DEMO_FAMILIES
from worker.errors import ModelError, ResourceError, TrainingError
from worker.policy.policy import Policy, load
from worker.trainer import checkpoint
from worker.trainer.trainer import Trainer

WARM = {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"}
GENERATION = settings.Generation(num_generations=4, max_completion_length=12)
GYM = environments.load(settings.Environment(families=DEMO_FAMILIES))


@pytest.fixture(scope="module")
def pristine():
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


def make_trainer(pristine, **options) -> Trainer:
    policy = Policy(copy.deepcopy(pristine.model), pristine.tokenizer, pristine.name)
    return Trainer(
        policy, settings.Trainer(**{"learning_rate": 3e-4, **WARM, **options}), GENERATION
    )


def run_round(trainer: Trainer, round: int, rng: random.Random):
    """Run a round as a worker does, and return its results."""
    tasks = GYM.sample(round, 6)
    questions = [GYM.question(t) for t in tasks]
    groups = []
    for task, question, answers in zip(
        tasks,
        questions,
        trainer.policy.generate(questions, GENERATION, rng.getrandbits(31)),
        strict=True,
    ):
        texts = tuple(c.text for c in answers)
        groups.append(
            scored_group(
                task,
                question,
                texts,
                tuple(GYM.score(task, texts)),
                token_ids=tuple(c.token_ids for c in answers),
                truncated=tuple(c.truncated for c in answers),
            )
        )
    metrics = trainer.step(groups)
    return [g.rewards for g in groups], metrics.loss, metrics.grad_norm, metrics.learning_rate


def test_training_goes_on_number_for_number(pristine, tmp_path):
    rng = random.Random(5)
    unbroken = make_trainer(pristine)
    expected = [run_round(unbroken, round, rng) for round in range(6)]

    rng = random.Random(5)
    first = make_trainer(pristine)
    observed = [run_round(first, round, rng) for round in range(3)]
    checkpoint.save(tmp_path, first, {"round": 3, "rng": rng.getstate()}, keep=2)

    second = make_trainer(pristine)
    state = checkpoint.restore(tmp_path, second)
    version, numbers, gauss = state["rng"]
    rng = random.Random()
    rng.setstate((version, tuple(numbers), gauss))
    observed += [run_round(second, round, rng) for round in range(state["round"], 6)]
    assert observed == expected
    assert second.steps == unbroken.steps
    for ours, theirs in zip(
        second.policy.model.parameters(), unbroken.policy.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_bfloat16_model_goes_on_from_its_float32_masters(pristine, tmp_path):
    def start():
        policy = Policy(copy.deepcopy(pristine.model).to(torch.bfloat16), pristine.tokenizer, "x")
        return Trainer(policy, settings.Trainer(learning_rate=1e-5), GENERATION)

    unbroken, rng = start(), random.Random(1)
    expected = [run_round(unbroken, round, rng) for round in range(4)]
    first, rng = start(), random.Random(1)
    observed = [run_round(first, round, rng) for round in range(2)]
    checkpoint.save(tmp_path, first, {}, keep=1)
    second = start()
    checkpoint.restore(tmp_path, second)
    observed += [run_round(second, round, rng) for round in range(2, 4)]
    assert observed == expected


def test_no_checkpoint_is_none(pristine, tmp_path):
    assert checkpoint.restore(tmp_path, make_trainer(pristine)) is None
    assert checkpoint.restore(tmp_path / "absent", make_trainer(pristine)) is None


def test_newest_n_are_kept(pristine, tmp_path):
    trainer = make_trainer(pristine)
    for round in range(4):
        checkpoint.save(tmp_path, trainer, {"round": round}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-00000003",
        "checkpoint-00000004",
    ]
    assert checkpoint.restore(tmp_path, trainer) == {"round": 3}


def test_files_hold_no_pickle(pristine, tmp_path):
    trainer = make_trainer(pristine)
    run_round(trainer, 0, random.Random(0))
    path = checkpoint.save(tmp_path, trainer, {}, keep=1)
    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_unfinished_checkpoint_is_ignored_and_removed(pristine, tmp_path):
    trainer = make_trainer(pristine)
    checkpoint.save(tmp_path, trainer, {"round": 1}, keep=2)
    unfinished = tmp_path / ".unfinished-checkpoint-00000002"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert checkpoint.restore(tmp_path, trainer) == {"round": 1}
    plain_file = tmp_path / ".unfinished-by-somebody"
    plain_file.write_text("")
    checkpoint.save(tmp_path, trainer, {"round": 2}, keep=2)
    assert not unfinished.exists()
    assert not plain_file.exists()


def test_damaged_checkpoint_gives_way_to_the_one_before(pristine, tmp_path, caplog):
    trainer = make_trainer(pristine)
    checkpoint.save(tmp_path, trainer, {"round": 1}, keep=2)
    newest = checkpoint.save(tmp_path, trainer, {"round": 2}, keep=2)
    os.truncate(newest / "model.safetensors", 1000)
    assert checkpoint.restore(tmp_path, trainer) == {"round": 1}
    assert "checkpoint damaged" in caplog.text
    for path in tmp_path.iterdir():
        (path / "state.json").write_text("{")
    with pytest.raises(TrainingError, match="none of 2 can be read"):
        checkpoint.restore(tmp_path, trainer)


def change_record(path: Path, **changes) -> None:
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | changes))


def break_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, path / "model.safetensors")


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, path / "optimizer.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.json").write_text("{}"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "state.json").write_text("[" * 100_000 + "]" * 100_000),
        lambda path: change_record(path, version="1"),
        lambda path: change_record(path, steps=None),
        lambda path: change_record(path, state=[]),
        lambda path: change_tensors(path, lambda tensors: tensors.clear()),
        lambda path: change_tensors(
            path, lambda tensors: tensors["optimizer.0.exp_avg"].fill_(math.inf)
        ),
        lambda path: break_weight(path),
        lambda path: change_tensors(path, lambda tensors: tensors.pop("random.cpu")),
        lambda path: change_tensors(
            path, lambda tensors: tensors.update({"random.cpu": torch.zeros(3)})
        ),
        lambda path: change_tensors(path, lambda tensors: tensors.pop("optimizer.0.exp_avg")),
        lambda path: change_tensors(
            path, lambda tensors: tensors.update({"optimizer.0.exp_avg": torch.zeros(3)})
        ),
        lambda path: change_tensors(
            path, lambda tensors: tensors.update({"optimizer.x.step": torch.zeros(())})
        ),
    ],
)
@pytest.mark.usefixtures("usual_recursion_limit")
def test_checkpoint_with_parts_missing_or_wrong_changes_nothing(pristine, tmp_path, caplog, damage):
    trained = make_trainer(pristine)
    run_round(trained, 0, random.Random(0))
    damage(checkpoint.save(tmp_path, trained, {"round": 2}, keep=2))
    untouched = make_trainer(pristine)
    with pytest.raises(TrainingError, match="none of 1 can be read"):
        checkpoint.restore(tmp_path, untouched)
    assert "checkpoint damaged, trying the one before" in caplog.text
    for ours, theirs in zip(
        untouched.policy.model.parameters(), pristine.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert (untouched.steps, untouched.optimizer.state_dict()["state"]) == (0, {})


def test_bfloat16_checkpoint_without_its_masters_is_damaged_and_a_float32_one_gives_them(
    pristine, tmp_path
):
    policy = Policy(
        copy.deepcopy(pristine.model).to(torch.bfloat16), pristine.tokenizer, pristine.name
    )
    trainer = Trainer(policy, settings.Trainer(), GENERATION)
    path = checkpoint.save(tmp_path / "16", trainer, {}, keep=1)
    change_tensors(path, lambda tensors: tensors.pop("master.0"))
    with pytest.raises(TrainingError, match="none of 1 can be read"):
        checkpoint.restore(tmp_path / "16", trainer)
    full = make_trainer(pristine)
    with torch.no_grad():
        full.masters[0].add_(1)
    checkpoint.save(tmp_path / "32", full, {}, keep=1)
    checkpoint.restore(tmp_path / "32", trainer)
    assert torch.equal(trainer.masters[0], full.masters[0])


def test_checkpoint_of_another_model_is_a_model_error(pristine, tmp_path):
    checkpoint.save(tmp_path, make_trainer(pristine), {}, keep=1)
    config = copy.deepcopy(pristine.model.config)
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    other = Policy(type(pristine.model)(config), pristine.tokenizer, "other")
    with pytest.raises(
        ModelError,
        match=(
            r"is of model hivewright/tiny, whose weights do not fit other; set model\.name and"
            r" trainer\.lora back"
        ),
    ):
        checkpoint.restore(tmp_path, Trainer(other, settings.Trainer(), GENERATION))


def test_checkpoint_of_a_model_of_the_same_shapes_is_refused_by_its_name(pristine, tmp_path):
    checkpoint.save(tmp_path, make_trainer(pristine), {}, keep=1)
    instructed = Policy(copy.deepcopy(pristine.model), pristine.tokenizer, "owner/model-Instruct")
    with pytest.raises(
        ModelError,
        match=(
            r"is of model hivewright/tiny, and this node's is owner/model-Instruct; set model.name"
            r" .* back, or move"
        ),
    ):
        checkpoint.restore(tmp_path, Trainer(instructed, settings.Trainer(), GENERATION))


def test_full_disk_leaves_the_old_checkpoint_and_says_so(pristine, tmp_path):
    trainer = make_trainer(pristine)
    checkpoint.save(tmp_path, trainer, {"round": 1}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Files are limited to 1 MB, so writing the weights fails half-way, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        with pytest.raises(
            ResourceError,
            match=r"checkpoint-00000002: can't be written: .*; earlier ones are kept; free space",
        ):
            checkpoint.save(tmp_path, trainer, {"round": 2}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert checkpoint.restore(tmp_path, trainer) == {"round": 1}


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from worker import environments, settings
from worker.policy.policy import load
from worker.trainer import checkpoint
from worker.trainer.trainer import Trainer
policy = load(settings.Model(device="cpu", threads=1))
trainer = Trainer(policy, settings.Trainer(), settings.Generation())
for round in range(1000):
    checkpoint.save(Path(sys.argv[1]), trainer, {"round": round}, keep=2)
"""


def test_kill_at_any_moment_leaves_a_checkpoint_that_loads(pristine, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SAVE_FOR_EVER, str(tmp_path)]
    process = preloaded.Popen(command, "worker.node")
    try:
        deadline = time.monotonic() + 100
        while (
            newest_number(tmp_path) < 3 and time.monotonic() < deadline and process.poll() is None
        ):
            time.sleep(0.02)
        time.sleep(random.random() * 0.1)
    finally:
        process.kill()
        process.wait(10)
    assert newest_number(tmp_path) >= 3
    # Number n was the n-th save: the restored one is complete and the newest.
    trainer = make_trainer(pristine)
    assert checkpoint.restore(tmp_path, trainer) == {"round": newest_number(tmp_path) - 1}
    checkpoint.save(tmp_path, trainer, {}, keep=2)
    assert len(list(tmp_path.iterdir())) == 2


TRAIN_ROUNDS = """
import json, random, sys
from pathlib import Path
import torch
sys.path.insert(0, "TESTS")
from test_checkpoint import load, make_trainer, run_round, settings
from worker.trainer import checkpoint
torch.set_num_threads(1)
pristine = load(settings.Model(device="cpu"))
rounds = int(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    torch.manual_seed(0)
    trainer = make_trainer(pristine)
    state = checkpoint.restore(folder / "checkpoints", trainer) or {"round": 0}
    trainer.fit(folder / "budget.json")
    for round in range(state["round"], rounds):
        observed = run_round(trainer, round, random.Random(round))
        with (folder / "curve").open("a") as curve:
            curve.write(json.dumps([round, observed]) + "\\n")
        checkpoint.save(folder / "checkpoints", trainer, {"round": round + 1}, keep=2)
"""


def train_rounds(rounds: int, *folders: Path) -> subprocess.Popen:
    """Start a process that trains a run in each folder, one after the other, to its end."""
    code = TRAIN_ROUNDS.replace("TESTS", str(Path(__file__).parent))
    command = [sys.executable, "-W", "ignore", "-c", code, str(rounds), *folders]
    return preloaded.Popen(command, "worker.node")


def read_curve(folder: Path) -> dict[int, str]:
    """Return the results of each round; a repeated round must have the same results."""
    curve: dict[int, str] = {}
    for line in (folder / "curve").read_text().splitlines():
        round = json.loads(line)[0]
        assert curve.setdefault(round, line) == line
    return curve


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("rounds", "kills"), [(6, 1), pytest.param(12, 2, marks=pytest.mark.nightly)]
)
def test_curve_of_a_run_killed_at_random_moments_is_that_of_the_unbroken_one(
    tmp_path, rounds, kills
):
    folders = [tmp_path / "killed", tmp_path / "unbroken"]
    for folder in folders:
        folder.mkdir()
    for kill in range(1, kills + 1):
        process = train_rounds(rounds, folders[0])
        try:
            wait_for_lines(folders[0] / "curve", kill * rounds // 3, process)
            time.sleep(random.random() * 0.3)
        finally:
            process.kill()
            process.wait(10)
    last = train_rounds(rounds, *folders)
    try:
        assert last.wait(500) == 0
    finally:
        last.kill()
        last.wait(10)
    expected = read_curve(folders[1])
    assert len(expected) == rounds
    assert read_curve(folders[0]) == expected


def wait_for_lines(file: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if file.is_file() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)


def newest_number(folder: Path) -> int:
    return max(
        (int(p.name.removeprefix("checkpoint-")) for p in folder.glob("checkpoint-*")), default=0
    )

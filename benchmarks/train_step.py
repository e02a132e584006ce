"""One training step against TRL 1.16: time, peak memory, equality of loss and gradients.

    python -m benchmarks.train_step [--shapes tiny] [--repeats 5] [--threads 2] [--clock wall]
        [--device cpu] [--model FOLDER [--length 64]] [--kinds float32-even] [--json FILE]

The same tokens and advantages go to `worker.trainer.Trainer.step` and to TRL's
`GRPOTrainer.train()`, whose generation alone is replaced by the given batch; everything else has
TRL's defaults (including gradient checkpointing; a second column is without). Two prompts of the
default mix x 8 completions, 16 sequences in one batch: "even", all of 128 tokens, and "ragged", of
1 to 128 tokens as answers are. Two models have random weights: "tiny" has 5 M parameters (Qwen2,
vocabulary 512), "half" is Qwen2.5-0.5B's shape; `--model` adds another, with answers of `--length`
tokens. Times are medians of alternating pairs (`--clock cpu --threads 1` counts processor time, for
busy machines); peak memory is that of a separate process above its model, or the GPU's with
`--device cuda`. Exits 1 if a claim of the table is not met.
"""

import argparse
import gc
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from trl import GRPOConfig, GRPOTrainer

from worker import environments, settings
from worker.policy import lora, memory
from worker.policy.policy import Policy, load
from worker.records import Completion, Rollout, ScoredGroup
from worker.trainer.lesson import Lesson
from worker.trainer.trainer import Trainer

GROUPS, SIZE, LENGTH = 2, 8, 128
TOKENS = 1536
"""Tokens of our micro-batches, a prompt with its completions in each: less memory, same step."""
WANTED_SPEED = 2.5
WANTED_DIFFERENCE = 1e-5

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "half": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """A case: a model's shape or folder, weights' type, completion lengths, and device."""

    shape: str
    dtype: str
    lengths: str
    device: str = "cpu"
    length: int = LENGTH

    def __str__(self) -> str:
        name = self.shape if self.shape in SHAPES else Path(self.shape).name
        length = "" if self.length == LENGTH else f" {self.length}"
        return (
            f"{name} {self.dtype}"
            f" {self.lengths}{length}{'' if self.device == 'cpu' else f' {self.device}'}"
        )


def make_policy(case: Case) -> Policy:
    if case.shape not in SHAPES:
        return load(settings.Model(name=case.shape, dtype=case.dtype, device=case.device))  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = Qwen2Config(
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=3, **SHAPES[case.shape]
    )
    model = Qwen2ForCausalLM(config).to(case.device, getattr(torch, case.dtype))
    model.generation_config.eos_token_id = 3
    return Policy(model, load(settings.Model(device="cpu")).tokenizer, case.shape)


def make_groups(case: Case, policy: Policy) -> list[ScoredGroup]:
    """Return the batch: questions of the default mix with random tokens as answers."""
    rng = random.Random(0)
    environment = environments.load(settings.Environment())
    asked = [(task, environment.question(task)) for task in environment.sample(1, 100)]
    fitting = [(task, text) for task, text in asked if 100 <= len(policy.prompt_ids(text)) <= 300]
    groups = []
    for task, question in rng.sample(fitting, GROUPS):
        lengths = [
            case.length if case.lengths == "even" else rng.randint(1, case.length)
            for _ in range(SIZE)
        ]
        token_ids = [tuple(rng.randrange(4, 512) for _ in range(length)) for length in lengths]
        rollouts = (
            Rollout("", rng.random(), Completion("", ids, (), truncated=False)) for ids in token_ids
        )
        groups.append(ScoredGroup(task, question, tuple(rollouts)))
    return groups


def make_trainer(case: Case, policy: Policy) -> Trainer:
    trainer = settings.Trainer(max_tokens_per_micro_batch=TOKENS, num_iterations=1)
    return Trainer(
        policy,
        trainer,
        settings.Generation(num_generations=SIZE, max_completion_length=case.length),
    )


def as_inputs(batch: list[Lesson]) -> dict[str, torch.Tensor]:
    """Return the same batch as TRL prepares it: prompts padded left, completions right."""
    prompt_width, width = (
        max(len(s.prompt_ids) for s in batch),
        max(len(s.token_ids) for s in batch),
    )
    prompts = [[0] * (prompt_width - len(s.prompt_ids)) + list(s.prompt_ids) for s in batch]
    prompt_mask = [
        [0] * (prompt_width - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in batch
    ]
    completions = [list(s.token_ids) + [0] * (width - len(s.token_ids)) for s in batch]
    mask = [[1] * len(s.token_ids) + [0] * (width - len(s.token_ids)) for s in batch]
    return {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor(prompt_mask),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor([s.advantage for s in batch]),
        "num_items_in_batch": torch.tensor(sum(map(sum, mask))),
    }


class Reference(GRPOTrainer):  # type: ignore[misc]
    """Return TRL's trainer; each `train()` takes one optimizer step on the given batch."""

    def __init__(
        self, case: Case, policy: Policy, inputs: dict[str, torch.Tensor], checkpointing: bool
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="train-step-")
        config = GRPOConfig(
            output_dir=self._folder.name,
            per_device_train_batch_size=GROUPS * SIZE,
            num_generations=SIZE,
            max_completion_length=case.length,
            max_steps=1,
            bf16=policy.model.dtype == torch.bfloat16,
            gradient_checkpointing=checkpointing,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=policy.model.device.type == "cpu",
            disable_tqdm=True,
        )
        super().__init__(
            model=policy.model,
            reward_funcs=lambda prompts, **_: [0.0] * len(prompts),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "x"}] * GROUPS * SIZE),
            processing_class=policy.tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self.watch = Watch()
        self.add_callback(self.watch)
        self._inputs = {name: tensor.to(policy.model.device) for name, tensor in inputs.items()}

    def _generate_and_score_completions(self, _: Any) -> dict[str, torch.Tensor]:
        return dict(self._inputs)

    def step(self) -> float:
        self.train()
        return self.watch.seconds


def wall_clock() -> float:
    """Return the time in seconds, after all work of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": wall_clock, "cpu": time.process_time}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Records the duration of TRL's last optimizer step, and its gradients if requested."""

    def __init__(self) -> None:
        self.clock = "wall"
        self.seconds = self._started = 0.0
        self.wants_gradients = False
        self.gradients: dict[str, torch.Tensor] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = CLOCKS[self.clock]()

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        if self.wants_gradients:
            self.gradients = gradients_of(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = CLOCKS[self.clock]() - self._started


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def make_reference(case: Case, checkpointing: bool) -> Reference:
    policy = make_policy(case)
    trainer = make_trainer(case, policy)
    batch = [s for group in make_groups(case, policy) for s in trainer._read(group)]
    theirs = make_policy(case)
    if trainer.lora is not None:
        lora.attach(theirs.model, trainer.lora)
        lora.use_peft_layers(theirs.model)
        disturb_adapters(theirs)
    return Reference(case, theirs, as_inputs(batch), checkpointing)


def disturb_adapters(policy: Policy) -> None:
    """Set the adapters' second factors, which begin as 0 and make all other gradients 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def make_step(case: Case, way: str, clock: str) -> Callable[[], float]:
    """Take one step in this `way`; return its seconds by `clock`."""
    if way != "ours":
        reference = make_reference(case, way == "TRL")
        reference.watch.clock = clock
        return reference.step
    policy = make_policy(case)
    trainer, groups = make_trainer(case, policy), make_groups(case, policy)

    def step() -> float:
        started = CLOCKS[clock]()
        trainer.step(groups)
        return CLOCKS[clock]() - started

    return step


WAYS = ("ours", "TRL", "TRL without checkpointing")


def measure_times(case: Case, repeats: int, clock: str) -> dict[str, list[float]]:
    """Return the seconds of each way, alternating, so that a disturbance affects both."""
    steps = {way: make_step(case, way, clock) for way in WAYS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, step in steps.items():
            seconds[way].append(step())
    return seconds


def measure_memory(case: Case, way: str) -> float:
    """Return the peak MB of two steps above the loaded model, in a separate process.

    Infinite: the kernel killed the process, as its memory did not fit into this machine.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.train_step",
        "--memory-of",
        json.dumps(astuple(case)),
        way,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode == -signal.SIGKILL and way != "ours":
        return math.inf
    done.check_returncode()
    return float(done.stdout.splitlines()[-1])


def print_memory(case: Case, way: str) -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, kill this process
    step = make_step(case, way, "wall")
    on_gpu = case.device == "cuda"
    before = torch.cuda.memory_allocated() / 1e6 if on_gpu else memory_mb("VmRSS")
    step()
    step()
    print((torch.cuda.max_memory_allocated() / 1e6 if on_gpu else memory_mb("VmHWM")) - before)


def memory_mb(name: str) -> float:
    """Return a memory figure of this process: VmRSS is its present size, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def compare(case: Case) -> tuple[float, float]:
    """Return the largest relative differences of loss and gradients on the first step.

    An on-policy loss is a sum of advantages near zero, so it is compared with the sum of their
    absolute values, and a gradient with the largest number of its tensor.
    """
    policy = make_policy(case)
    trainer = make_trainer(case, policy)
    disturb_adapters(policy)
    batch = [s for group in make_groups(case, policy) for s in trainer._read(group)]
    trainer._weigh(batch)
    ours = trainer._backward(batch, is_first=True).loss
    # bfloat16 gradients are collected in float32 masters.
    names = trainer.parameters
    gradients = {
        n: m.grad for n, m in zip(names, trainer.masters, strict=True) if m.grad is not None
    }

    reference = make_reference(case, checkpointing=True)
    reference.watch.wants_gradients = True
    reference.args.max_grad_norm = 0.0  # gradients as they are
    loss = reference.train().training_loss
    size = sum(abs(s.advantage) * s.weight * len(s.token_ids) for s in batch)
    theirs = reference.watch.gradients
    assert theirs.keys() == gradients.keys()
    worst = max(float((gradients[n] - g).abs().max() / g.abs().max()) for n, g in theirs.items())
    return abs(ours - loss) / size, worst


def main() -> None:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_memory(Case(*json.loads(arguments.memory_of[0])), arguments.memory_of[1])
        return

    results: list[dict[str, Any]] = []
    failed: list[str] = []
    print(
        f"{'':22}  {'ours':>10}  {'TRL':>10}  {'ratio':>6}  {'TRL, no checkpointing':>21} "
        f" {'ratio':>6}"
    )
    for case in chosen_cases(arguments):
        repeats = 1 if case.shape == "half" else arguments.repeats
        failed += measure(case, repeats, arguments.clock, results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        raise SystemExit("not reached: " + "; ".join(failed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shapes",
        nargs="*",
        choices=SHAPES,
        default=["tiny"],
        help="half: minutes, 20 GB of memory",
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="a model of your own, in transformers' format"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=LENGTH,
        help="tokens of an answer to that model (of the longest)",
    )
    parser.add_argument(
        "--kinds", nargs="*", metavar="DTYPE-LENGTHS", help="of all four, such as bfloat16-ragged"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("CASE", "WAY"), help="print the memory that one way takes"
    )
    return parser.parse_args()


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    device = arguments.device
    kinds = [
        (dtype, lengths) for dtype in ("float32", "bfloat16") for lengths in ("even", "ragged")
    ]
    if arguments.kinds is not None:
        kinds = [kind for kind in kinds if "-".join(kind) in arguments.kinds]
    cases = []
    if "tiny" in arguments.shapes:
        cases += [Case("tiny", *kind, device) for kind in kinds]
    if "half" in arguments.shapes:
        cases.append(Case("half", "bfloat16", "even", device))
    if arguments.model:
        cases += [Case(arguments.model, *kind, device, arguments.length) for kind in kinds]
    return cases


def measure(
    case: Case,
    repeats: int,
    clock: str,
    results: list[dict[str, Any]],
) -> list[str]:
    """Measure and print one case, and add its figures to `results`; return the missed claims."""
    # Memory first, while this process holds no model.
    peaks = {way: measure_memory(case, way) for way in WAYS}
    used = print_row(results, case, "MB at the peak", peaks)
    times = measure_times(case, repeats, clock)
    gc.collect()  # a trainer of transformers refers to itself
    memory.release(torch.device(case.device))
    medians = {way: statistics.median(seconds) for way, seconds in times.items()}
    speed = print_row(results, case, "seconds", medians, times)
    loss, gradients = compare(case)
    print(
        f"{case!s:22}  largest relative difference: loss {loss:.1e}, gradients {gradients:.1e}\n",
        flush=True,
    )
    for name, difference in (("loss", loss), ("gradients", gradients)):
        claim = f"train step, {case}: largest relative difference of {name}"
        results.append(
            {
                "claim": claim,
                "ours": difference,
                "reference": 0.0,
                "ratio": None,
                "unit": "relative",
            }
        )
    failed = []
    if speed < WANTED_SPEED or used < 1:
        failed.append(f"{case}: {speed:.2f} times the speed, {used:.2f} times less memory")
    if case.dtype == "float32" and max(loss, gradients) >= WANTED_DIFFERENCE:
        failed.append(f"{case}: loss or gradients differ")
    return failed


def print_row(
    results: list[dict[str, Any]],
    case: Case,
    unit: str,
    values: dict[str, float],
    pairs: dict[str, list[float]] | None = None,
) -> float:
    """Print a table; return how many times better ours is than TRL's default, by the median."""
    ratios = {}
    for way in WAYS[1:]:
        ratios[way] = values[way] / values["ours"]
        if pairs is not None:
            ratios[way] = statistics.median(
                t / o for t, o in zip(pairs[way], pairs["ours"], strict=True)
            )
        results.append(
            {
                "claim": f"train step, {case}: {unit}, against {way}",
                "ours": round(values["ours"], 4),
                "reference": finite(values[way], 4),
                "ratio": finite(ratios[way], 2),
                "unit": unit,
            }
        )
    ours, trl, plain = (show(values[way], unit) for way in WAYS)
    print(
        f"{case!s:22}  {ours:>10}  {trl:>10}  {ratios[WAYS[1]]:6.2f}  {plain:>21} "
        f" {ratios[WAYS[2]]:6.2f}",
        flush=True,
    )
    return ratios[WAYS[1]]


def finite(value: float, digits: int) -> float | None:
    """Return a rounded figure for JSON; None: it is infinite, for what did not fit."""
    return round(value, digits) if math.isfinite(value) else None


def show(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "does not fit"
    return f"{value:.3f} s" if unit == "seconds" else f"{value:.0f} MB"


if __name__ == "__main__":
    main()

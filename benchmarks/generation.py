"""Generation speed: our engine against a loop over `model.generate` and other ways.

    python -m benchmarks.generation [--shapes tiny small half] [--runs 3] [--threads 2]
        [--clock wall] [--dtype auto] [--device cpu] [--model FOLDER] [--json FILE]

Two prompts of 96 and 80 tokens (the median of the default mix is 96), eight completions each, the
same lengths for all: 128 new tokens of the small models, 32 of the large one. The loop is what RL
Swarm's node does: one call of `model.generate` for each completion index; TRL's is what its
`GRPOTrainer` does with the same prompts' tokens. The contenders alternate, so that a noisy machine
is noisy for all; figures are medians and include prefill. Exits 1 if a claim's ratio is missed. On
a busy machine one thread and `--clock cpu`, which counts this process's time, give reliable ratios.
With `--device cuda` all models are in bfloat16.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from worker import settings
from worker.policy import policy
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.engine import Ending
from worker.policy.engines.torch_engine import TorchEngine
from worker.policy.model_sizing import TINY

NUM_GENERATIONS = 8
PROMPT_LENGTHS = (96, 80)
NUM_ROWS = len(PROMPT_LENGTHS) * NUM_GENERATIONS


@dataclass(frozen=True)
class Shape:
    """A model shape to measure.

    `model`: a configuration, for random weights, or a model's name or folder. `wanted`: its
    expected ratio to the loop.
    """

    title: str
    model: transformers.PretrainedConfig | str
    num_tokens: int
    wanted: float


def qwen2(
    vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int
) -> Any:
    return transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


SHAPES = {
    "tiny": Shape(TINY, TINY, 128, 12.0),
    "small": Shape("5 M parameters", qwen2(512, 256, 5, 8, 4, 1024), 128, 12.0),
    "half": Shape("Qwen2.5-0.5B", qwen2(151936, 896, 24, 14, 2, 4864), 32, 20.0),
}


def load(shape: Shape, device: str) -> Any:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if isinstance(shape.model, str):
        return policy.load(settings.Model(name=shape.model, device="cpu")).model.to(device, dtype)
    return transformers.AutoModelForCausalLM.from_config(shape.model).to(device, dtype).eval()


def contenders(
    model: Any, engine: TorchEngine, prompts: list[list[int]], num_tokens: int, folder: str
) -> dict[str, Callable[[], None]]:
    """Return the contenders by name; each samples 2 x 8 completions of exactly `num_tokens`.

    `folder`: a temporary folder for TRL.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = (
        (torch.arange(width) >= torch.tensor([width - len(p) for p in prompts])[:, None])
        .long()
        .to(model.device)
    )
    length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": 1, **length}
    generation = settings.Generation(
        num_generations=NUM_GENERATIONS, max_completion_length=num_tokens
    )
    endless = Ending(frozenset(), lambda tokens: False, [False] * model.config.vocab_size)
    trainer = make_trainer(model, num_tokens, folder)
    repeated = [prompt for prompt in prompts for _ in range(NUM_GENERATIONS)]

    def loop() -> None:
        for _ in range(NUM_GENERATIONS):
            model.generate(ids, attention_mask=mask, **options)

    def batched() -> None:
        model.generate(ids, attention_mask=mask, num_return_sequences=NUM_GENERATIONS, **options)

    def trl() -> None:
        model.train()
        completions, _ = trainer._generate_single_turn(repeated, None, {}, NUM_GENERATIONS)
        model.eval()
        if {len(completion) for completion in completions} != {num_tokens}:
            raise SystemExit(
                f"TRL's completions are not of {num_tokens} tokens: {sorted(map(len, completions))}"
            )

    def ours() -> None:
        engine.generate(prompts, generation, 0, endless)

    return {"loop": loop, "batched": batched, "TRL": trl, "ours": ours}


def make_trainer(model: Any, num_tokens: int, folder: str) -> GRPOTrainer:
    """Return TRL's trainer without gradient checkpointing, which would stay with the model."""
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=NUM_ROWS,
        num_generations=NUM_GENERATIONS,
        max_completion_length=num_tokens,
        generation_kwargs={"min_new_tokens": num_tokens},
        use_cpu=model.device.type == "cpu",
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
    )
    tokenizer = policy.load(settings.Model(name=TINY, device="cpu")).tokenizer
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda prompts, **_: [0.0] * len(prompts),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * NUM_ROWS),
        processing_class=tokenizer,
    )


def time_all(
    ways: dict[str, Callable[[], None]], runs: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return median seconds by name: a warm-up of ours, then `runs` rounds over all contenders."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ways["ours"]()
    for _ in range(runs):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory_bandwidth(device: str) -> float:
    """Return the bytes per second that a large copy reads (and writes)."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    best = min(_time(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() * 4 / best


def product_rate(rows: int, device: str) -> float:
    """Return operations per second of a product with this many rows and cached weights.

    The product is in float32 on a CPU.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight = (
        torch.randn(rows, 1024, device=device).to(dtype),
        torch.randn(1024, 2048, device=device).to(dtype),
    )
    return 2 * rows * weight.numel() / min(_time(lambda: x @ weight) for _ in range(50))


def _time(work: Callable[[], Any]) -> float:
    started = wall_clock()
    work()
    return wall_clock() - started


def wall_clock() -> float:
    """Return the time in seconds, after all work of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Machine:
    """Limits of a machine: `bandwidth` in bytes per second, `rate` in operations per second."""

    device: str
    bandwidth: float
    rate: float


def measure(
    shape: Shape, runs: int, clock: Callable[[], float], dtype: str, machine: Machine
) -> list[dict[str, Any]]:
    """Print one shape's table; return its part of the JSON file."""
    model = load(shape, machine.device)
    prompts = [torch.randint(5, model.config.vocab_size, (n,)).tolist() for n in PROMPT_LENGTHS]
    engine = TorchEngine(model, dtype)
    assert isinstance(engine.decoder, LeanDecoder)
    with tempfile.TemporaryDirectory(prefix="generation-") as folder:
        seconds = time_all(
            contenders(model, engine, prompts, shape.num_tokens, folder), runs, clock
        )
    num_tokens = NUM_ROWS * shape.num_tokens
    print(
        f"\n{shape.title}: {model.num_parameters():,} parameters, 2 x 8 x {shape.num_tokens} tokens"
    )
    print(f"{'way':>10}  {'tokens/s':>9}  {'of the loop':>11}")
    for name, value in seconds.items():
        print(f"{name:>10}  {num_tokens / value:9.1f}  {seconds['loop'] / value:10.1f}x")
    print_floors(model, engine.decoder, seconds["ours"] / shape.num_tokens, machine)
    return [
        {
            "claim": f"{shape.title}, 2 x 8 x {shape.num_tokens} tokens, against {name}",
            "ours": round(num_tokens / seconds["ours"], 1),
            "reference": round(num_tokens / seconds[name], 1),
            "ratio": round(seconds[name] / seconds["ours"], 2),
            "unit": "tokens/s",
        }
        for name in seconds
        if name != "ours"
    ]


def print_floors(model: Any, decoder: LeanDecoder, step: float, machine: Machine) -> None:
    """Return a step's seconds for all rows, with its share of the prefill."""
    weights = decoder.weights
    with torch.no_grad():
        next(model.parameters()).add_(1e-6 if model.dtype == torch.float32 else 1.0)
    copying = _time(weights.refresh)
    reading = model.num_parameters() * weights.dtype.itemsize / machine.bandwidth
    computing = 2 * model.num_parameters() * NUM_ROWS / machine.rate
    print(
        f"a step of ours takes {step * 1e3:.2f} ms with its share of the prefill:"
        f" {step / reading:.1f} times as long as reading the weights ({reading * 1e3:.2f} ms),"
        f" {step / computing:.1f} times as long as torch's products alone ({computing * 1e3:.2f}"
        f" ms)\nweights in {weights.dtype}, copied in {copying:.3f} s after a training step",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument(
        "--model", metavar="FOLDER", help="a model of your own, in transformers' format, too"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.clock == "cpu" else wall_clock
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of TRL's, about what it asks transformers for
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    machine = Machine(device, memory_bandwidth(device), product_rate(NUM_ROWS, device))
    processor = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    print(
        f"{processor}, {arguments.threads} threads, {arguments.clock} time; "
        f"copy {machine.bandwidth / 1e9:.1f} GB/s (read and written); "
        f"torch's product of {NUM_ROWS} rows {machine.rate / 1e9:.0f} GFLOP/s; "
        f"AMX {'yes' if torch.cpu._is_amx_tile_supported() else 'no'}"
    )
    results, missed = [], []
    shapes = [SHAPES[name] for name in arguments.shapes]
    if arguments.model:
        shapes.append(Shape(Path(arguments.model).name, arguments.model, 128, 12.0))
    for shape in shapes:
        measured = measure(shape, arguments.runs, clock, arguments.dtype, machine)
        results += measured
        if (ratio := measured[0]["ratio"]) < shape.wanted:
            missed.append(f"{shape.title}: {ratio:.1f}x the loop, {shape.wanted:g}x wanted")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()

"""Choose a model that fits this machine, once, at enrolment.

Pools and limits are in models.yaml. A node with `model.name: auto` keeps its choice in `model.json`
in its state folder; the choice is never repeated while that file exists. A name or path in the
settings takes precedence.
"""

import importlib.util
import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from worker import settings
from worker.errors import ModelError, ResourceError
from worker.policy import device, memory
from worker.runtime.files import write_whole
from worker.runtime.state_dir import StateDir

AUTO = "auto"
TINY = "hivewright/tiny"
GIB = 2**30
_LARGE_ENOUGH_FOR_BFLOAT16 = 50_000_000
"""Number of parameters above which matrix products take most of a training step on a CPU."""


@dataclass(frozen=True)
class Candidate:
    """A model of a pool."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Pool:
    """Models of one size, for GPUs with at least `min_gpu_gib` in total; 0: any machine."""

    name: str
    min_gpu_gib: float
    models: tuple[Candidate, ...]


@dataclass(frozen=True)
class Pools:
    """The contents of models.yaml."""

    bytes_per_parameter: dict[str, int]
    bytes_per_frozen_parameter: dict[str, int]
    lora_bytes_per_parameter_and_rank: float
    working_gib: float
    pools: tuple[Pool, ...]


@dataclass(frozen=True)
class Machine:
    """The device that the model will run on.

    `gpu_gib` is the GPU's total memory, 0 on a CPU; `free_gib` the free memory of GPU or RAM.
    """

    device: str
    dtype: str
    gpu_gib: float
    free_gib: float


@dataclass(frozen=True)
class Verdict:
    """The verdict on whether a model fits; `reason` is why it does not, None if it does."""

    pool: str
    name: str
    needed_gib: float
    reason: str | None


@dataclass(frozen=True)
class Choice:
    """The choice at enrolment, and the machine that it was made for."""

    name: str
    pool: str
    device: str
    free_gib: float


@cache
def load_pools() -> Pools:
    """Return the pools in models.yaml."""
    raw = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text())
    return TypeAdapter(Pools).validate_python(raw)


def auto_dtype(
    device: str,
    parameters: int | None = None,
) -> str:
    """Return the type of the weights for `model.dtype: auto` on this machine.

    `parameters`: the number of the model's parameters; None: that of a model chosen by `auto`.
    """
    if device != "cpu":
        return "bfloat16"
    is_large = parameters is None or parameters >= _LARGE_ENOUGH_FOR_BFLOAT16
    # AMX multiplies bfloat16 ten times as fast as a CPU multiplies float32, AVX-512 with bfloat16
    # twice as fast. On other CPUs bfloat16 is slower.
    is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if is_large and is_fast else "float32"


def measure(model: settings.Model) -> Machine:
    """Measure the device that the configured model will run on.

    Raises ModelError for a GPU that does not exist, ResourceError for one that was assigned to this
    process and is gone.
    """
    device = chosen_device(model)
    if device == "cpu":
        dtype = auto_dtype("cpu") if model.dtype == "auto" else model.dtype
        return Machine("cpu", dtype, 0.0, memory.free(torch.device("cpu")) / GIB)
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise ModelError(
            f"model.device: {device}: torch sees {torch.cuda.device_count()} GPUs; expected one of"
            " those, or cpu"
        )
    free, total = torch.cuda.mem_get_info(index)
    dtype = auto_dtype("cuda") if model.dtype == "auto" else model.dtype
    return Machine(f"cuda:{index}", dtype, total / GIB, free / GIB)


def chosen_device(model: settings.Model) -> str:
    """Return the device that model.device names, or the one for `auto`.

    Raises ResourceError if a GPU was assigned to this process and CUDA is unavailable, because
    training on the CPU would look healthy. CUDA_VISIBLE_DEVICES that is empty or -1 means no GPU.
    """
    if model.device != "auto":
        return model.device
    if torch.cuda.is_available():
        return "cuda:0"
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if given and not given.startswith("-") and given != "NoDevFiles":
        raise ResourceError(
            f"CUDA_VISIBLE_DEVICES is {given}, and torch finds no CUDA: the GPU assigned to this"
            f" worker is gone, or its driver does not answer; {device.missing_files()}see"
            " `nvidia-smi` and `dmesg`, start again when the GPU is listed, or set model.device"
            " to cpu"
        )
    return "cpu"


_DRIVERS_GPUS = Path("/proc/driver/nvidia/gpus")
"""The driver's list of GPUs, which does not depend on the build of torch."""


def count_unused_gpus(model: settings.Model, device: str) -> int:
    """Return the number of GPUs that the driver lists although `model.device: auto` uses the CPU.

    0 if CUDA_VISIBLE_DEVICES is set: the choice was then deliberate.
    """
    if model.device != "auto" or device != "cpu" or "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    return len(list(_DRIVERS_GPUS.glob("*")))


def judge(
    machine: Machine,
    trainer: settings.Trainer,
) -> list[Verdict]:
    """Return a verdict on each model of each pool: whether training it fits the machine."""
    pools = load_pools()
    verdicts = []
    for pool in pools.pools:
        for model in pool.models:
            needed = _needed_gib(model.parameters, machine, trainer)
            reason = None
            if machine.gpu_gib < pool.min_gpu_gib:
                has = f"{machine.gpu_gib:.1f} GiB" if machine.gpu_gib else "no GPU"
                least = f"{pool.min_gpu_gib:g} GiB"
                reason = f"for GPUs of {least} and more; {machine.device} has {has}"
            elif machine.free_gib < needed:
                reason = f"{machine.free_gib:.1f} GiB are free on {machine.device}"
            verdicts.append(Verdict(pool.name, model.name, needed, reason))
    return verdicts


def choose(
    machine: Machine,
    trainer: settings.Trainer,
    peer_id: str,
) -> Choice:
    """Return a model that fits, from the first pool that has one.

    The peer id decides among those of a pool. Raises ModelError if no model fits.
    """
    verdicts = judge(machine, trainer)
    fitting = [verdict for verdict in verdicts if verdict.reason is None]
    if not fitting:
        least = min(verdicts, key=lambda verdict: verdict.needed_gib)
        raise ModelError(
            f"model.name: auto: no model fits: {machine.free_gib:.1f} GiB are free on"
            f" {machine.device}, the smallest, {least.name}, needs {least.needed_gib:.1f} to train"
            f" in {machine.dtype}; free memory, or name a model yourself (hivewright/tiny fits"
            " everywhere)"
        )
    best = [verdict for verdict in fitting if verdict.pool == fitting[0].pool]
    chosen = random.Random(f"model/{peer_id}").choice(best)
    return Choice(chosen.name, chosen.pool, machine.device, round(machine.free_gib, 1))


def decide(
    model: settings.Model,
    trainer: settings.Trainer,
    folder: Path,
    peer_id: str,
) -> str:
    """Return the name of the node's model; with `auto` choose and store it, unless it is stored."""
    if model.name != AUTO:
        return model.name
    if not (StateDir(folder).model_choice).exists():
        choice = choose(measure(model), trainer, peer_id)
        write_whole(StateDir(folder).model_choice, json.dumps(asdict(choice), indent=2) + "\n")
    return settle(model, folder).name


def settle(
    model: settings.Model,
    folder: Path,
) -> settings.Model:
    """Return the settings with the choice at enrolment instead of `auto`.

    Raises ModelError if there is no choice.
    """
    if model.name != AUTO:
        return model
    file = StateDir(folder).model_choice
    try:
        choice = TypeAdapter(Choice).validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        raise ModelError(
            f"{file}: missing, and model.name is auto: no model was chosen for this node; run"
            " `hivewright enrol`"
        ) from None
    except ValidationError as error:
        raise ModelError(
            f"{file}: {error.errors()[0]['msg']}; expected the file that `hivewright enrol` writes;"
            " restore it from a backup, or name the model in model.name"
        ) from None
    return model.model_copy(update={"name": choice.name})


def explain(
    model: settings.Model,
    trainer: settings.Trainer,
    folder: Path,
) -> list[str]:
    """Return lines about the machine, whether each model fits, and the node's model."""
    machine = measure(model)
    memory = f"{machine.free_gib:.1f} GiB free"
    if machine.gpu_gib:
        memory += f" of {machine.gpu_gib:.1f}"
    lines = [f"models for {machine.device} in {machine.dtype}, {memory}:"]
    for verdict in judge(machine, trainer):
        fits = "fits" if verdict.reason is None else f"does not: {verdict.reason}"
        lines.append(
            f"  {verdict.pool:<6} {verdict.name:<28} needs {verdict.needed_gib:4.1f} GiB: {fits}"
        )
    if model.name != AUTO:
        return [
            *lines,
            f"this node: {model.name}, as model.name says{_fit_of(model, machine, trainer)}",
        ]
    if (StateDir(folder).model_choice).exists():
        return [*lines, f"this node: {settle(model, folder).name}, chosen when it enrolled"]
    return [
        *lines,
        "this node: model.name is auto; `hivewright enrol` chooses one of those that fit",
    ]


def _needed_gib(
    parameters: int,
    machine: Machine,
    trainer: settings.Trainer,
) -> float:
    pools = load_pools()
    frozen = pools.bytes_per_frozen_parameter[machine.dtype]
    lora = trainer.lora_for(parameters)
    if lora is not None:  # with adapters, the frozen model is also the reference
        per_parameter = frozen + pools.lora_bytes_per_parameter_and_rank * lora.rank
    else:
        per_parameter = pools.bytes_per_parameter[machine.dtype] + (frozen if trainer.beta else 0)
    return parameters * per_parameter / GIB + pools.working_gib


def needed_gib(
    model: settings.Model,
    machine: Machine,
    trainer: settings.Trainer,
) -> float | None:
    """Estimate the memory to train a model, in GiB, by its number of parameters.

    None if their number is unknown before the download.
    """
    for pool in load_pools().pools:
        for candidate in pool.models:
            if candidate.name == model.name:
                return _needed_gib(candidate.parameters, machine, trainer)
    folder = find_folder(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return _needed_gib(sum(map(_count_parameters, files)), machine, trainer) if files else None


def find_folder(model: settings.Model) -> Path | None:
    """Return the folder of the model; None if it is on Hugging Face, or a GGUF file.

    Raises ModelError for a path without a model.
    """
    name = model.name
    if name == TINY:
        return Path(__file__).parent / "tiny"
    if is_gguf(name):
        if not Path(name).expanduser().is_file():
            raise ModelError(
                f"model.name: {name}: no such file; expected a GGUF file, a folder or a Hugging"
                " Face name"
            )
        return None
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir() or name.startswith(("/", "./", "../", "~")):
        raise ModelError(
            f"model.name: {name}: no config.json there; expected a folder with a transformers model"
        )
    if model.shared_dir is not None and (shared := shared_folder(model.shared_dir, name)).is_dir():
        return shared
    return None


def is_gguf(name: str) -> bool:
    """Return whether a model is a file in llama.cpp's format rather than a folder."""
    return name.lower().endswith(".gguf")


def gguf_arguments(model: settings.Model) -> dict[str, str]:
    """Return transformers' arguments for a GGUF file; empty for other models.

    Raises ModelError if the package that reads such files is not installed.
    """
    if not is_gguf(model.name):
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model.name: {model.name}: a GGUF file, and the package gguf, which reads it, is not"
            f" installed; install it ({sys.executable} -m pip install gguf), or name a folder in"
            " transformers' format"
        )
    return {"gguf_file": Path(model.name).name}


def find_source_folder(model: settings.Model) -> Path | None:
    """Return the folder that transformers loads from; None if the model is on Hugging Face.

    Raises ModelError as `find_folder` does.
    """
    folder = find_folder(model)
    return Path(model.name).expanduser().parent if is_gguf(model.name) else folder


def require_context(
    model: settings.Model,
    generation: settings.Generation,
) -> None:
    """Call `compare_context` for a model whose files are on this machine; skip others."""
    folder = find_folder(model)
    if folder is None:
        return
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
        config = config.get("text_config", config)
        context = config.get("max_position_embeddings", config.get("n_positions"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file}: can't be read: {error}; expected a model's configuration; get the file again"
        ) from None
    if type(context) is not int and context is not None:
        raise ModelError(
            f"{file}: max_position_embeddings: got {context!r}, expected a whole number; get the"
            " file again"
        )
    compare_context(model.name, context, generation)


def compare_context(
    name: str,
    context: int | None,
    generation: settings.Generation,
) -> None:
    """Raise ModelError if the longest prompt and completion exceed the model's context."""
    wanted = generation.max_prompt_length + generation.max_completion_length
    if context is not None and wanted > context:
        raise ModelError(
            f"model {name}: takes {context} tokens, generation.max_prompt_length"
            f" {generation.max_prompt_length} and generation.max_completion_length"
            f" {generation.max_completion_length} make {wanted}; lower them, or take a model with a"
            " longer context"
        )


def shared_folder(shared_dir: Path, name: str) -> Path:
    """Return the folder of a Hugging Face model among shared models; it exists when complete."""
    return shared_dir / name.replace("/", "--")


def _fit_of(
    model: settings.Model,
    machine: Machine,
    trainer: settings.Trainer,
) -> str:
    """Return text about the needed memory and whether it fits; "" if that is unknown."""
    needed = needed_gib(model, machine, trainer)
    if needed is None:
        return ""
    fits = "fits"
    if needed > machine.free_gib:
        fits = f"does not fit: {machine.free_gib:.1f} GiB are free"
    return f": needs {needed:.1f} GiB: {fits}"


def _count_parameters(file: Path) -> int:
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: can't be read: {error}; expected a model's weights as safetensors"
        ) from None


def free_ram_gib() -> float:
    """Return the RAM that a process of this control group may still use, in GiB."""
    return memory.free(torch.device("cpu")) / GIB

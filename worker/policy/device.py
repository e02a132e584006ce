"""Check that torch computes correctly on a device: a product and its gradient, known exactly."""

import re
import subprocess
import time
from pathlib import Path

import torch

from worker.errors import ModelError

SIZE = 256
UVM, DXG = Path("/dev/nvidia-uvm"), Path("/dev/dxg")
# What nvidia-smi prints instead of a figure that it can't read from a card. [N/A] is normal.
_SICK = re.compile(r"ERR!|Unknown Error|requires reset|is lost|Unable to determine", re.I)


def missing_files() -> str:
    """Return advice for a message if the driver's device files are missing, otherwise ""."""
    if UVM.exists() or DXG.exists():
        return ""
    return (
        f"{UVM} is missing: run `nvidia-modprobe -u -c 0` as root (Debian's package"
        " nvidia-modprobe); "
    )


def sick_cards() -> list[str]:
    """Return nvidia-smi's lines about broken GPUs, including GPUs of other processes."""
    query = [
        "nvidia-smi",
        "--query-gpu=index,uuid,memory.used,utilization.gpu",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(
            query, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"nvidia-smi can't be run: {error.strerror}"]
    except subprocess.TimeoutExpired:
        return ["no answer within 20 s"]
    return [line.strip() for line in (said.stdout + said.stderr).splitlines() if _SICK.search(line)]


def gpu_uuid(device: torch.device | str) -> str | None:
    """Return the UUID of a GPU, as nvidia-smi lists it; None: `device` is not a GPU."""
    where = torch.device(device)
    if where.type != "cuda":
        return None
    found = str(torch.cuda.get_device_properties(where).uuid)
    return found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


def compute(
    device: str,
    dtype: str,
) -> tuple[str, float]:
    """Compute a product and its gradient; return the device's name and the time in seconds.

    The time includes the start of the device. `dtype` is float32 or bfloat16. Raises ModelError
    with cause and fix for a missing GPU, one without kernels in this build of torch, a driver that
    fails, or wrong results.
    """
    where = torch.device(device)
    name = "CPU"
    if where.type == "cuda":
        name = _require_build(where)
    began = time.monotonic()
    try:
        matrix = torch.eye(SIZE, device=where, dtype=getattr(torch, dtype)) * 2
        matrix.requires_grad_()
        ones = torch.ones(SIZE, SIZE, device=where, dtype=matrix.dtype)
        total = (matrix @ ones).sum()
        torch.autograd.backward(total)
        gradient = matrix.grad
        # The sum is twice the number of elements, and the gradient SIZE everywhere, in either type.
        is_right = total.item() == 2 * SIZE * SIZE
        is_right = is_right and gradient is not None and bool((gradient == SIZE).all())
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ModelError(
            f"{name} ({device}): torch {torch.__version__} fails there: {said}; see `nvidia-smi`"
            " and the kernel's log, reset or replace the GPU, or set model.device to another"
        ) from None
    if not is_right:
        raise ModelError(
            f"{name} ({device}): computes wrong numbers; don't train on it, set model.device to"
            " another"
        )
    return name, time.monotonic() - began


def _require_build(where: torch.device) -> str:
    if not torch.cuda.is_available():
        raise ModelError(
            f"{where}: torch {torch.__version__} sees no GPU; {missing_files()}see that"
            " `nvidia-smi` works as this user, and install a torch for its CUDA (torch_index), or"
            " set model.device to cpu"
        )
    index = where.index or 0
    if index >= torch.cuda.device_count():
        raise ModelError(
            f"{where}: torch sees {torch.cuda.device_count()} GPUs; set model.device to one of"
            " those, or cpu"
        )
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    built = torch.cuda.get_arch_list()
    # A build has kernels for an architecture, or for an earlier minor one of the same major.
    fitting = [arch for arch in built if arch.startswith("sm_") and _fits(arch, major, minor)]
    if built and not fitting:
        raise ModelError(
            f"{name}: is sm_{major}{minor}, and torch {torch.__version__} is built for"
            f" {', '.join(built)}; install a build that has it: set torch_index to the wheels of a"
            " newer (or older) CUDA"
        )
    return name


def _fits(
    arch: str,
    major: int,
    minor: int,
) -> bool:
    digits = "".join(c for c in arch.removeprefix("sm_") if c.isdecimal())
    return int(digits[:-1]) == major and int(digits[-1]) <= minor

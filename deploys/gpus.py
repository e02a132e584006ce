"""The GPUs of a host, as its driver reports them, and which build of torch fits them.

A driver that does not answer is never taken for a host without GPUs: the host is refused, with the reason.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from worker.errors import SettingsError

Version = tuple[int, int]

TORCH = "2.13.0"
X86, ARM = "x86_64", "aarch64"
INDEXES = "https://download.pytorch.org/whl"
CPU_INDEX = f"{INDEXES}/cpu"
DRIVER_ADVICE = "install or mend the NVIDIA driver until `nvidia-smi` lists the GPUs"

_VERSION = re.compile(r"(\d+)\.(\d+)(\.\d+)*")
QUERY = "index,uuid,name,memory.total,compute_cap,driver_version"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `capability`: compute capability, such as (8, 9)."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    capability: Version


@dataclass(frozen=True, slots=True)
class Gpus:
    """A host's GPUs. `driver_cuda`: the newest CUDA that the driver runs; None without one.

    `problem`: why the GPUs of the host can't be used, None if they can, or if there are none.
    `warning`: what nvidia-smi says of cards that can't be used, while others can.
    """

    cards: tuple[Gpu, ...] = ()
    driver_cuda: Version | None = None
    driver: str | None = None
    problem: str | None = None
    warning: str | None = None

    @property
    def by_index(self) -> dict[int, Gpu]:
        """The cards by nvidia-smi's number: that of a dead card is left out."""
        return {card.index: card for card in self.cards}


def parse(lines: Collection[str]) -> Gpus:
    """What `HostGpus` found: lines that begin with gpu, cuda, problem or card (a GPU without a driver)."""
    found = [line.strip().partition(" ")[::2] for line in lines if line.strip()]
    problem = " ".join(text for kind, text in found if kind == "problem")
    num_idle = sum(kind == "card" for kind, _ in found)
    has_rows = any(kind == "gpu" for kind, _ in found)
    if problem and not has_rows:
        return Gpus(problem=f"nvidia-smi says: {problem}; {DRIVER_ADVICE}")
    if num_idle:
        return Gpus(problem=f"there are NVIDIA GPUs ({num_idle}), but no nvidia-smi; {DRIVER_ADVICE}")
    rows = [[cell.strip() for cell in text.split(",")] for kind, text in found if kind == "gpu"]
    if not rows:
        return Gpus()
    ram_mib = next((int(text) // 1024 for kind, text in found if kind == "ram" and text.isdecimal()), 0)
    cards, dead = [], [problem] if problem else []
    for row in rows:
        try:
            cards.append(_card(row, ram_mib))
        except (ValueError, IndexError):
            dead.append(", ".join(row))
    said = "; ".join(dead)
    if not cards:
        return Gpus(problem=f"nvidia-smi says: {said}; expected {QUERY} of each GPU")
    cuda = next((_version(t) for kind, t in found if kind == "cuda" and _VERSION.fullmatch(t)), None)
    driver = next(row[5] for row in rows if len(row) == 6)
    return Gpus(tuple(cards), cuda, driver, warning=f"nvidia-smi says: {said}" if dead else None)


def _card(row: Sequence[str], ram_mib: int) -> Gpu:
    """Return the GPU of a row. Raises ValueError or IndexError if the row is not that of one.

    A card without a memory figure of its own ([N/A]) shares the machine's: its figure stands in.
    """
    index, uuid, name, memory, capability, _ = row
    has_own = re.fullmatch(r"[0-9.]+", memory) is not None
    is_shared = memory in ("[N/A]", "N/A", "[Not Supported]") and ram_mib
    if not uuid.startswith("GPU-") or not (has_own or is_shared):
        raise ValueError(uuid)
    return Gpu(int(index), uuid, name, int(float(memory)) if has_own else ram_mib, _version(capability))


@dataclass(frozen=True, slots=True)
class Build:
    """A build of torch. `cuda`: what it is built with. `kernels`: the capabilities that it has kernels for, by machine.

    `min_driver`: the oldest driver that runs this CUDA, by NVIDIA's compatibility within a major version.
    """

    name: str
    cuda: Version
    min_driver: str
    kernels: Mapping[str, tuple[Version, ...]]

    @property
    def index(self) -> str:
        return f"{INDEXES}/{self.name}"

    def runs_on(self, card: Gpu, machine: str) -> bool:
        """Kernels for 8.6 run on 8.9, but neither on 8.0 nor on 9.0."""
        major, minor = card.capability
        return any(major == m and n <= minor for m, n in self.kernels.get(machine, ()))


# The builds that PyTorch publishes for this version of torch, the one that is preferred first.
# fmt: off
BUILDS = (
    Build(
        "cu130", (13, 0), "580",
        {
            X86: ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
            ARM: ((8, 0), (9, 0), (10, 0), (11, 0), (12, 0)),
        },
    ),
    Build(
        "cu126", (12, 6), "525",
        {X86: ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0)), ARM: ((8, 0), (9, 0))},
    ),
)
# fmt: on


def choose_torch(gpus: Gpus, index: str | None, machine: str = X86) -> str:
    """The package index that the host takes torch from. `index`: what the inventory asks for; None: by the facts.

    Raises SettingsError, with the fix, if no build runs on all GPUs of the host, or the one that is asked for does not.
    """
    asked = next((build for build in BUILDS if index and index.rstrip("/").endswith(f"/{build.name}")), None)
    if index is not None:
        if asked is not None:
            _refuse_misfit(asked, gpus, machine)
        return index
    if not gpus.cards:
        return CPU_INDEX
    able = [build for build in BUILDS if all(build.runs_on(card, machine) for card in gpus.cards)]
    for build in able:
        if _driver_runs(build, gpus):
            return build.index
    if able:
        raise SettingsError(_driver_too_old(able[-1], gpus))
    raise SettingsError(_no_build(gpus.cards, machine))


def _refuse_misfit(build: Build, gpus: Gpus, machine: str) -> None:
    for card in gpus.cards:
        if not build.runs_on(card, machine):
            fit = next((other.index for other in BUILDS if other.runs_on(card, machine)), None)
            fix = f"set torch_index to {fit}, or leave it out" if fit else _no_build([card], machine)
            raise SettingsError(f"torch_index: {build.name} has no kernels for {_named(card)}{_on(machine)}; {fix}")
    if gpus.cards and not _driver_runs(build, gpus):
        raise SettingsError(_driver_too_old(build, gpus))


def _driver_runs(build: Build, gpus: Gpus) -> bool:
    """A driver runs every CUDA of its own major version, and of those before."""
    return gpus.driver_cuda is not None and gpus.driver_cuda[0] >= build.cuda[0]


def _driver_too_old(build: Build, gpus: Gpus) -> str:
    cuda = "no CUDA" if gpus.driver_cuda is None else "CUDA {}.{}".format(*gpus.driver_cuda)
    return (
        f"driver {gpus.driver} runs {cuda}; torch {TORCH} for {_named(gpus.cards[0])} ({build.name}) needs driver "
        f"{build.min_driver} or newer: upgrade the NVIDIA driver"
    )


def _no_build(cards: Collection[Gpu], machine: str) -> str:
    known = [capability for build in BUILDS for capability in build.kernels.get(machine, ())]
    if not known:
        return f"there is no build of torch {TORCH} for GPUs{_on(machine)}; set torch_index to an index with one"
    for card in cards:
        if not any(build.runs_on(card, machine) for build in BUILDS):
            why = "newer" if card.capability > max(known) else "older"
            return (
                f"{_named(card)} is {why} than every build of torch {TORCH}{_on(machine)} knows; "
                f"set torch_index to an index with a build for it, or to {CPU_INDEX} to train on the CPU"
            )
    names = ", ".join(_named(card) for card in cards)
    return f"no build of torch {TORCH} has kernels for all of {names}; give only those of one kind slots, by their gpu"


def _on(machine: str) -> str:
    return "" if machine == X86 else f" on {machine}"


def _named(card: Gpu) -> str:
    return "{} (compute capability {}.{})".format(card.name, *card.capability)


def _version(text: str) -> Version:
    found = _VERSION.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])

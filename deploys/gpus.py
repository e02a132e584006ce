"""The GPUs of a host, as its driver reports them.

A driver that does not answer never counts as a host without GPUs: the host is refused, with the
reason.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from worker.errors import SettingsError

Version = tuple[int, int]

TORCH = "2.13.0"
X86, ARM = "x86_64", "aarch64"
INDEXES = "https://download.pytorch.org/whl"
CPU_INDEX = f"{INDEXES}/cpu"
DRIVER_ADVICE = "install or fix the NVIDIA driver until `nvidia-smi` lists the GPUs"

_VERSION = re.compile(r"(\d+)\.(\d+)(\.\d+)*")
QUERY = "index,uuid,name,memory.total,compute_cap,driver_version"


# Where WSL2 keeps the Windows driver's tools and libraries; it is not in the PATH of every shell.
WSL_LIB = "/usr/lib/wsl/lib"
FIND_TOOLS = f'PATH="$PATH:{WSL_LIB}";'
# What nvidia-smi prints for a figure that a card does not have, as opposed to one it can't read
# (ERR!).
NO_FIGURE = ("[N/A]", "N/A", "[Not Supported]")
NO_SLICE = (
    "GPU {index} ({name}) is in MIG mode and has no slice, so nothing can compute on it: make"
    " slices (`nvidia-smi mig -i {index} -cgi PROFILE -C`) or leave MIG mode (`nvidia-smi -i"
    " {index} -mig 0`)"
)
NO_WSL_DRIVER = (
    f"WSL2 shows a GPU (/dev/dxg), but there is no nvidia-smi, neither in PATH nor in {WSL_LIB}: if"
    " it is an NVIDIA GPU, install its driver in Windows and run `wsl --shutdown` there"
)
# A line of `nvidia-smi -L`: a card, or below it a slice, whose profile says its memory (1g.10gb,
# 1c.3g.20gb+me).
_CARD_LINE = re.compile(r"GPU (\d+): .*\(UUID: GPU-\S+\)")
_SLICE_LINE = re.compile(r"MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-\S+)\)")
_PROFILE_GB = re.compile(r"\.(\d+)gb")
# A card's number, or CARD:SLICE.
Number = int | str


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one slice of a GPU that is partitioned (MIG).

    `index`: nvidia-smi's number of the card. `uuid`: its id for CUDA_VISIBLE_DEVICES. `memory_mib`:
    for a slice, the size in its profile. `capability`: compute capability, such as (8, 9). `part`:
    the card's number of the slice, None for a whole card.
    """

    index: int
    uuid: str
    name: str
    memory_mib: int
    capability: Version
    part: int | None = None

    @property
    def number(self) -> Number:
        """Its name in an inventory (`gpu`): 3, or 3:0 for the first slice of card 3."""
        return self.index if self.part is None else f"{self.index}:{self.part}"


@dataclass(frozen=True, slots=True)
class Gpus:
    """A host's GPUs and slices of them.

    `driver_cuda`: the newest CUDA version that the driver runs; None without a driver. `problem`:
    why the GPUs cannot be used; None if they can, or if there are none. `warning`: nvidia-smi's
    message about unusable cards next to usable ones. `is_wsl`: the GPUs are reached through WSL2's
    /dev/dxg.
    """

    cards: tuple[Gpu, ...] = ()
    driver_cuda: Version | None = None
    driver: str | None = None
    problem: str | None = None
    warning: str | None = None
    is_wsl: bool = False

    @property
    def by_number(self) -> dict[Number, Gpu]:
        """The usable cards by their number."""
        return {card.number: card for card in self.cards}


def parse(lines: Collection[str]) -> Gpus:
    """Parse the output of `HostGpus`; each line begins with its kind.

    gpu: a row of nvidia-smi's table. list: a line of `nvidia-smi -L`. mig: index and MIG mode.
    cuda, ram: figures. problem: an error message of nvidia-smi. card: a GPU without a driver. dxg:
    WSL2's GPU.
    """
    found = [line.strip().partition(" ")[::2] for line in lines if line.strip()]
    problem = " ".join(text for kind, text in found if kind == "problem")
    num_idle = sum(kind == "card" for kind, _ in found)
    rows = [[cell.strip() for cell in text.split(",")] for kind, text in found if kind == "gpu"]
    is_wsl = any(kind == "dxg" for kind, _ in found)
    if problem and not rows:
        return Gpus(problem=f"nvidia-smi says: {problem}; {DRIVER_ADVICE}")
    if num_idle:
        return Gpus(
            problem=f"there are NVIDIA GPUs ({num_idle}), but no nvidia-smi; {DRIVER_ADVICE}"
        )
    if not rows:
        return Gpus(warning=NO_WSL_DRIVER if is_wsl else None)
    ram_mib = next(
        (int(text) // 1024 for kind, text in found if kind == "ram" and text.isdecimal()), 0
    )
    cards, dead = _cards(rows, ram_mib, _slices(text for kind, text in found if kind == "list"))
    cards, empty = _without_empty(cards, [text for kind, text in found if kind == "mig"])
    if problem:
        dead.insert(0, problem)
    said = [f"nvidia-smi says: {'; '.join(dead)}"] if dead else []
    if not cards:
        said = [f"{said[0]}; expected {QUERY} of each GPU"] if dead else []
        return Gpus(problem="; ".join([*said, *empty]))
    cuda = next(
        (_version(t) for kind, t in found if kind == "cuda" and _VERSION.fullmatch(t)), None
    )
    driver = next(row[5] for row in rows if len(row) == 6)
    return Gpus(
        tuple(cards), cuda, driver, warning="; ".join([*said, *empty]) or None, is_wsl=is_wsl
    )


def _cards(
    rows: Collection[Sequence[str]],
    ram_mib: int,
    slices: Mapping[int, Sequence[tuple[str, int, str]]],
) -> tuple[list[Gpu], list[str]]:
    """Return the GPUs of these rows, slices in place of partitioned ones, and the bad rows."""
    cards, dead = [], []
    for row in rows:
        try:
            card = _card(row, ram_mib, is_partitioned=row[0].isdecimal() and int(row[0]) in slices)
            cards += [_slice(card, *each) for each in slices.get(card.index, ())] or [card]
        except (ValueError, IndexError):
            dead.append(", ".join(row))
    return cards, dead


def _card(row: Sequence[str], ram_mib: int, is_partitioned: bool) -> Gpu:
    """Return the GPU of a row. Raises ValueError or IndexError if the row does not describe one.

    A card without a memory figure of its own ([N/A]) shares the machine's memory, whose size is
    used instead. The memory of a partitioned card does not matter, since its slices have their own.
    """
    index, uuid, name, memory, capability, _ = row
    has_own = re.fullmatch(r"[0-9.]+", memory) is not None
    is_shared = is_partitioned or (memory in NO_FIGURE and ram_mib > 0)
    if not uuid.startswith("GPU-") or not (has_own or is_shared):
        raise ValueError(uuid)
    return Gpu(
        int(index), uuid, name, int(float(memory)) if has_own else ram_mib, _version(capability)
    )


def _slices(lines: Iterable[str]) -> dict[int, list[tuple[str, int, str]]]:
    """Parse `nvidia-smi -L`: profile, number and UUID of each MIG slice, by card number."""
    found: dict[int, list[tuple[str, int, str]]] = {}
    index = None
    for line in lines:
        if card := _CARD_LINE.match(line.strip()):
            index = int(card[1])
        elif (each := _SLICE_LINE.match(line.strip())) and index is not None:
            found.setdefault(index, []).append((each[1], int(each[2]), each[3]))
    return found


def _slice(card: Gpu, profile: str, part: int, uuid: str) -> Gpu:
    """Return one slice of a card. Raises ValueError if its profile does not contain its memory."""
    memory = _PROFILE_GB.search(profile)
    if memory is None:
        raise ValueError(profile)
    name = f"{card.name} MIG {profile}"
    return replace(card, uuid=uuid, name=name, memory_mib=int(memory[1]) * 1024, part=part)


def _without_empty(cards: Sequence[Gpu], modes: Collection[str]) -> tuple[list[Gpu], list[str]]:
    """Remove whole cards that are in MIG mode, and return advice for each of them."""
    partitioned = {
        int(index)
        for index, _, mode in (text.partition(", ") for text in modes)
        if mode == "Enabled"
    }
    empty = [card for card in cards if card.part is None and card.index in partitioned]
    kept = [card for card in cards if card not in empty]
    return kept, [NO_SLICE.format(index=card.index, name=card.name) for card in empty]


@dataclass(frozen=True, slots=True)
class Build:
    """A build of torch.

    `cuda`: the CUDA version it is built with. `min_driver`: the oldest driver that runs this CUDA,
    by NVIDIA's compatibility within a major version. `kernels`: the capabilities that it has
    kernels for, by machine.
    """

    name: str
    cuda: Version
    min_driver: str
    kernels: Mapping[str, tuple[Version, ...]]

    @property
    def index(self) -> str:
        return f"{INDEXES}/{self.name}"

    def runs_on(self, card: Gpu, machine: str) -> bool:
        """Return whether its kernels run on a card: those for 8.6 run on 8.9, not on 8.0 or 9.0."""
        major, minor = card.capability
        return any(major == m and n <= minor for m, n in self.kernels.get(machine, ()))


# The builds that PyTorch publishes for this version of torch, the one that is preferred first.
BUILDS = (
    Build(
        "cu130",
        (13, 0),
        "580",
        {
            X86: ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
            ARM: ((8, 0), (9, 0), (10, 0), (11, 0), (12, 0)),
        },
    ),
    Build(
        "cu126",
        (12, 6),
        "525",
        {X86: ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0)), ARM: ((8, 0), (9, 0))},
    ),
)


def choose_torch(gpus: Gpus, index: str | None, machine: str = X86) -> str:
    """Return the package index from which the host takes torch.

    `index`: the inventory's choice; None chooses by the host's GPUs. Raises SettingsError, with the
    fix, if no build, or not the requested one, runs on all GPUs of the host.
    """
    asked = next(
        (build for build in BUILDS if index and index.rstrip("/").endswith(f"/{build.name}")), None
    )
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
            fix = (
                f"set torch_index to {fit}, or leave it out" if fit else _no_build([card], machine)
            )
            raise SettingsError(
                f"torch_index: {build.name} has no kernels for {_named(card)}{_on(machine)}; {fix}"
            )
    if gpus.cards and not _driver_runs(build, gpus):
        raise SettingsError(_driver_too_old(build, gpus))


def _driver_runs(build: Build, gpus: Gpus) -> bool:
    """Return whether the driver supports a build's CUDA: its own major version or an older one."""
    return gpus.driver_cuda is not None and gpus.driver_cuda[0] >= build.cuda[0]


def _driver_too_old(build: Build, gpus: Gpus) -> str:
    cuda = "no CUDA" if gpus.driver_cuda is None else "CUDA {}.{}".format(*gpus.driver_cuda)
    return (
        f"driver {gpus.driver} runs {cuda}; torch {TORCH} for {_named(gpus.cards[0])}"
        f" ({build.name}) needs driver {build.min_driver} or newer: upgrade the NVIDIA driver"
    )


def _no_build(cards: Collection[Gpu], machine: str) -> str:
    known = [capability for build in BUILDS for capability in build.kernels.get(machine, ())]
    if not known:
        return (
            f"there is no build of torch {TORCH} for GPUs{_on(machine)}; set torch_index to an"
            " index with one"
        )
    for card in cards:
        if not any(build.runs_on(card, machine) for build in BUILDS):
            why = "newer" if card.capability > max(known) else "older"
            return (
                f"{_named(card)} is {why} than every build of torch {TORCH}{_on(machine)} knows;"
                f" set torch_index to an index with a build for it, or to {CPU_INDEX} to train on"
                " the CPU"
            )
    names = ", ".join(_named(card) for card in cards)
    return (
        f"no build of torch {TORCH} has kernels for all of {names}; give only those of one kind"
        " slots, by their gpu"
    )


def _on(machine: str) -> str:
    return "" if machine == X86 else f" on {machine}"


def _named(card: Gpu) -> str:
    return "{} (compute capability {}.{})".format(card.name, *card.capability)


def _version(text: str) -> Version:
    found = _VERSION.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])

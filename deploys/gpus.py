"""The GPUs of a host, as its driver reports them.

A driver that does not answer never counts as a host without GPUs: the host is refused, with the
reason.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

Version = tuple[int, int]

DRIVER_ADVICE = "install or fix the NVIDIA driver until `nvidia-smi` lists the GPUs"

_VERSION = re.compile(r"(\d+)\.(\d+)(\.\d+)*")
QUERY = "index,uuid,name,memory.total,compute_cap,driver_version"


# WSL2's folder of the Windows driver's tools and libraries, which is not in every shell's PATH.
WSL_LIB = "/usr/lib/wsl/lib"
FIND_TOOLS = f'PATH="$PATH:{WSL_LIB}";'
# nvidia-smi's text for a figure that a card does not have (for one that it can't read: ERR!).
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


class _MigSlice(NamedTuple):
    """A line of `nvidia-smi -L` about a slice; `part`: its number on the card."""

    profile: str
    part: int
    uuid: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one slice of a GPU that is partitioned (MIG).

    `index`: nvidia-smi's number of the card. `uuid`: its id for CUDA_VISIBLE_DEVICES. `memory_mib`:
    for a slice, the size in its profile. `capability`: compute capability, such as (8, 9). `part`:
    number of the slice on its card, None for a whole card.
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


def parse(lines: Iterable[str]) -> Gpus:
    """Parse the output of `HostGpus`; each line begins with its kind.

    gpu: a row of nvidia-smi's table. list: a line of `nvidia-smi -L`. mig: index and MIG mode.
    cuda, ram: figures. problem: an error message of nvidia-smi. card: a GPU without a driver. dxg:
    WSL2's GPU.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        kind, _, text = line.strip().partition(" ")
        texts[kind].append(text)
    if texts["gpu"]:
        return _parse_rows(texts)
    if texts["problem"]:
        problem = " ".join(texts["problem"])
        return Gpus(problem=f"nvidia-smi says: {problem}; {DRIVER_ADVICE}")
    if num_idle := len(texts["card"]):
        return Gpus(
            problem=f"there are NVIDIA GPUs ({num_idle}), but no nvidia-smi; {DRIVER_ADVICE}"
        )
    return Gpus(warning=NO_WSL_DRIVER if texts["dxg"] else None)


def _parse_rows(texts: Mapping[str, Sequence[str]]) -> Gpus:
    """Return the GPUs of a host whose nvidia-smi printed a table, by the kinds of `parse`."""
    rows = [[cell.strip() for cell in text.split(",")] for text in texts["gpu"]]
    cards, dead = _cards(rows, _ram_mib(texts["ram"]), _slices(texts["list"]))
    cards, empty = _without_empty(cards, texts["mig"])
    if problem := " ".join(texts["problem"]):
        dead.insert(0, problem)
    messages = [f"nvidia-smi says: {'; '.join(dead)}"] if dead else []
    if not cards:
        messages = [f"{message}; expected {QUERY} of each GPU" for message in messages]
        return Gpus(problem="; ".join([*messages, *empty]))
    return Gpus(
        tuple(cards),
        driver_cuda=_cuda(texts["cuda"]),
        driver=next(row[5] for row in rows if len(row) == 6),
        warning="; ".join([*messages, *empty]) or None,
        is_wsl=bool(texts["dxg"]),
    )


def _ram_mib(texts: Sequence[str]) -> int:
    """Return the machine's memory from kB; 0: unknown."""
    numbers = [int(text) for text in texts if text.isdecimal()]
    return numbers[0] // 1024 if numbers else 0


def _cuda(texts: Sequence[str]) -> Version | None:
    versions = [_version(text) for text in texts if _VERSION.fullmatch(text)]
    return versions[0] if versions else None


def _cards(
    rows: Iterable[Sequence[str]],
    ram_mib: int,
    slices: Mapping[int, Sequence[_MigSlice]],
) -> tuple[list[Gpu], list[str]]:
    """Return the GPUs of these rows, slices in place of partitioned ones, and the bad rows."""
    cards: list[Gpu] = []
    dead: list[str] = []
    for row in rows:
        try:
            index = int(row[0])
            parts = slices.get(index, ())
            card = _card(row, ram_mib, is_partitioned=bool(parts))
            cards += [_slice_of(card, part) for part in parts] or [card]
        except (ValueError, IndexError):
            dead.append(", ".join(row))
    return cards, dead


def _card(
    row: Sequence[str],
    ram_mib: int,
    is_partitioned: bool,
) -> Gpu:
    """Return the GPU of a row. Raises ValueError or IndexError if the row does not describe one.

    A card without a memory figure of its own ([N/A]) shares the machine's memory, whose size is
    used instead. A partitioned card's memory does not matter, because its slices have their own.
    """
    index, uuid, name, memory, capability, _ = row
    if not uuid.startswith("GPU-"):
        raise ValueError(uuid)
    if re.fullmatch(r"[0-9.]+", memory):
        memory_mib = int(float(memory))
    elif is_partitioned or (memory in NO_FIGURE and ram_mib > 0):
        memory_mib = ram_mib
    else:
        raise ValueError(memory)
    return Gpu(int(index), uuid, name, memory_mib, _version(capability))


def _slices(lines: Iterable[str]) -> dict[int, list[_MigSlice]]:
    """Parse `nvidia-smi -L`: the MIG slices of each card, by its number."""
    found: dict[int, list[_MigSlice]] = defaultdict(list)
    index = None
    for line in lines:
        if card := _CARD_LINE.match(line.strip()):
            index = int(card[1])
            continue
        part = _SLICE_LINE.match(line.strip())
        if part and index is not None:
            profile, number, uuid = part.groups()
            found[index].append(_MigSlice(profile, int(number), uuid))
    return found


def _slice_of(card: Gpu, part: _MigSlice) -> Gpu:
    """Return one slice of a card. Raises ValueError if its profile does not contain its memory."""
    memory_gb = _PROFILE_GB.search(part.profile)
    if memory_gb is None:
        raise ValueError(part.profile)
    return replace(
        card,
        uuid=part.uuid,
        name=f"{card.name} MIG {part.profile}",
        memory_mib=int(memory_gb[1]) * 1024,
        part=part.part,
    )


def _without_empty(
    cards: Sequence[Gpu],
    modes: Iterable[str],
) -> tuple[list[Gpu], list[str]]:
    """Remove whole cards that are in MIG mode, and return advice for each of them."""
    partitioned = set()
    for text in modes:
        index, _, mode = text.partition(", ")
        if mode == "Enabled":
            partitioned.add(int(index))
    kept, advice = [], []
    for card in cards:
        if card.part is None and card.index in partitioned:
            advice.append(NO_SLICE.format(index=card.index, name=card.name))
        else:
            kept.append(card)
    return kept, advice


def _version(text: str) -> Version:
    found = _VERSION.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])

"""The builds of torch, and which of them fits the GPUs of a host."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deploys.gpus import Gpu, Gpus, Version
from worker.errors import SettingsError

TORCH = "2.13.0"
X86, ARM = "x86_64", "aarch64"
INDEXES = "https://download.pytorch.org/whl"
CPU_INDEX = f"{INDEXES}/cpu"


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

    def runs_on(
        self,
        card: Gpu,
        machine: str,
    ) -> bool:
        """Return whether its kernels run on a card: those for 8.6 run on 8.9, not on 8.0 or 9.0."""
        major, minor = card.capability
        same_major = [other for other in self.kernels.get(machine, ()) if other[0] == major]
        return any(other[1] <= minor for other in same_major)

    def runs_on_all(
        self,
        cards: Collection[Gpu],
        machine: str,
    ) -> bool:
        return all(self.runs_on(card, machine) for card in cards)


# The builds that PyTorch publishes for this version of torch, in the order of preference.
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


def choose_torch(
    gpus: Gpus,
    index: str | None,
    machine: str = X86,
) -> str:
    """Return the package index from which the host takes torch.

    `index`: the inventory's choice; None chooses by the host's GPUs. Raises SettingsError, with the
    fix, if no build, or not the requested one, runs on all GPUs of the host.
    """
    if index is not None:
        for build in BUILDS:
            if index.rstrip("/").endswith(f"/{build.name}"):
                _refuse_misfit(build, gpus, machine)
        return index
    if not gpus.cards:
        return CPU_INDEX
    able = [build for build in BUILDS if build.runs_on_all(gpus.cards, machine)]
    for build in able:
        if _driver_runs(build, gpus):
            return build.index
    if able:
        raise SettingsError(_driver_too_old(able[-1], gpus))
    raise SettingsError(_no_build(gpus.cards, machine))


def _refuse_misfit(
    build: Build,
    gpus: Gpus,
    machine: str,
) -> None:
    for card in gpus.cards:
        if not build.runs_on(card, machine):
            fitting = [other.index for other in BUILDS if other.runs_on(card, machine)]
            fix = f"set torch_index to {fitting[0]}, or leave it out" if fitting else None
            raise SettingsError(
                f"torch_index: {build.name} has no kernels for {_named(card)}{_on(machine)};"
                f" {fix or _no_build([card], machine)}"
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


def _no_build(
    cards: Collection[Gpu],
    machine: str,
) -> str:
    known: list[Version] = []
    for build in BUILDS:
        known += build.kernels.get(machine, ())
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

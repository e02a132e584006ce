"""The slots of a host: which GPU each gets, and how much of the machine.

A slot sees one GPU, by the driver's own id, so that neither a reboot nor a new card changes it.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainValidator

from deploys.gpus import WSL_LIB, Gpu, Gpus, Number
from deploys.inventory.schema import SlotCpus, SlotMemory
from deploys.inventory.secret_files import SLOT_SECRETS
from deploys.paths import CONFIGURATION, settings_file
from deploys.services import worker_unit
from worker.errors import SettingsError
from worker.settings import Environment, Family, Settings


def _gpu_number(value: object) -> Number:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"(0|[1-9]\d*):(0|[1-9]\d*)", value, re.ASCII):
        return value
    raise ValueError("the number of a GPU, such as 1, or of a MIG slice, such as '1:0'")


class SlotOptions(BaseModel):
    """The keys of a slot that are not settings of its worker."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    gpu: Annotated[Number, PlainValidator(_gpu_number)] | None = None
    """Number of its GPU in `nvidia-smi`, or CARD:SLICE for a slice of a partitioned GPU (MIG).

    None: the next GPU that no other slot names. Slots that name the same GPU share it.
    """
    slot_memory_gb: SlotMemory | None = None
    slot_cpus: SlotCpus | None = None


# No limits.
ALL = SlotOptions()


@dataclass(frozen=True, slots=True)
class Slot:
    """One worker of a host.

    `identity`: local file with the key that it must have; None: it has its own. `card`: the only
    GPU that it sees; None: all, or none. `secrets`: local files with its worker's secrets, by key
    of the inventory (SLOT_SECRETS). `model_token`: local file with the token that downloads its
    model; None: the model is public. `is_wsl`: the host's GPUs are reached through WSL2's /dev/dxg.
    """

    number: int
    settings: Settings
    identity: Path | None
    options: SlotOptions = ALL
    card: Gpu | None = None
    secrets: Mapping[str, Path] = field(default_factory=dict)
    model_token: Path | None = None
    is_wsl: bool = False

    @property
    def unit(self) -> str:
        return worker_unit(self.number)

    @property
    def file(self) -> Path:
        return settings_file(f"worker-{self.number}")

    def secret_file(self, key: str) -> Path:
        """Return root's file on the host for the secret that the inventory's `key` names."""
        return CONFIGURATION / f"worker-{self.number}.{SLOT_SECRETS[key]}"

    @property
    def wants_gpu(self) -> bool:
        """True if the slot uses a GPU where the host has one."""
        return self.settings.model.device != "cpu"

    @property
    def needs_device_files(self) -> bool:
        """True if the slot reaches its GPU through the device files of NVIDIA's driver."""
        return not self.is_wsl and (self.card is not None or _named_device(self) is not None)

    @property
    def _gpu_lines(self) -> list[str]:
        lines = [] if self.card is None else [f"Environment=CUDA_VISIBLE_DEVICES={self.card.uuid}"]
        if self.is_wsl:
            lines += [f"Environment=LD_LIBRARY_PATH={WSL_LIB}", "DeviceAllow=/dev/dxg rw"]
        return lines

    def enrol_settings(self) -> str:
        """Return the drop-in of its enrolment unit, which may choose a model by the GPU; or ""."""
        return _drop_in(self._gpu_lines)

    def unit_settings(self) -> str:
        """Return the drop-in of its unit, or ""."""
        lines = self._gpu_lines
        for key in sorted(self.secrets):
            lines.append(f"LoadCredential={SLOT_SECRETS[key]}:{self.secret_file(key)}")
        if self.settings.model.shared_dir is not None:
            lines.append(f"BindReadOnlyPaths=-{self.settings.model.shared_dir}")
        if self.options.slot_memory_gb is not None:
            lines.append(f"MemoryMax={round(self.options.slot_memory_gb * 10**9)}")
        if self.options.slot_cpus is not None:
            lines.append(f"CPUQuota={round(self.options.slot_cpus * 100)}%")
        return _drop_in(lines)


def _drop_in(lines: Sequence[str]) -> str:
    return "\n".join(["[Service]", *lines, ""]) if lines else ""


def cards_in_use(
    slots: Collection[Slot],
    gpus: Gpus,
) -> tuple[Gpu, ...]:
    """Return the GPUs that torch must run on."""
    used = {slot.card for slot in slots}
    used.update(gpus.by_number.get(number) for number in _named_devices(slots))
    return tuple(card for card in gpus.cards if card in used)


def place(
    slots: Sequence[Slot],
    gpus: Gpus,
) -> tuple[Slot, ...]:
    """Assign a GPU to each slot.

    Raises SettingsError, with a line for each slot that cannot get one.
    """
    if not any(slot.wants_gpu for slot in slots):
        return tuple(slots)
    if gpus.problem:
        raise SettingsError(f"{gpus.problem}, or set model_device to cpu")
    mistakes = list(_mistakes(slots, gpus))
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    if not gpus.cards:
        return tuple(slots)
    free = _free_numbers(slots, gpus)
    placed = []
    for slot in slots:
        if slot.wants_gpu:
            slot = replace(slot, is_wsl=gpus.is_wsl)
            if _named_device(slot) is None:
                number = slot.options.gpu if slot.options.gpu is not None else free.pop(0)
                slot = replace(slot, card=gpus.by_number[number])
        placed.append(slot)
    return tuple(placed)


def _free_numbers(
    slots: Iterable[Slot],
    gpus: Gpus,
) -> list[Number]:
    """Return the numbers of the GPUs that no slot names."""
    named = {*(slot.options.gpu for slot in slots), *_named_devices(slots)}
    return [number for number in gpus.by_number if number not in named]


def _mistakes(
    slots: Collection[Slot],
    gpus: Gpus,
) -> Iterator[str]:
    there_are = _described(gpus)
    for slot in slots:
        number, device = slot.options.gpu, slot.settings.model.device
        named = _named_device(slot)
        if number is not None and number not in gpus.by_number:
            yield f"slot {slot.number}: gpu: got {number}; {there_are}"
        if named is not None and named not in gpus.by_number:
            yield f"slot {slot.number}: model_device: got {device!r}; {there_are}"
        if device == "cuda" and not gpus.cards:
            yield f"slot {slot.number}: model_device: got 'cuda'; {there_are}; expected auto or cpu"
    unnamed = [slot for slot in slots if slot.options.gpu is None and _named_device(slot) is None]
    waiting = [slot for slot in unnamed if slot.wants_gpu]
    rest = waiting[len(_free_numbers(slots, gpus)) :]
    if gpus.cards and rest:
        numbers = ", ".join(str(slot.number) for slot in rest)
        yield (
            f"slots: no GPU is left for slot {numbers}; {there_are}: take fewer slots (or auto),"
            " give those that share one the same gpu, or model_device cpu"
        )


def _described(gpus: Gpus) -> str:
    """Describe the GPUs of a host by their number, kind and numbering."""
    if not gpus.cards:
        return "the host has no GPU"
    numbers = list(gpus.by_number)
    has_slices = any(card.part is not None for card in gpus.cards)
    kind = "GPUs and slices (MIG)" if has_slices else "GPUs"
    is_counted = numbers == list(range(len(numbers)))
    numbering = "from 0" if is_counted else ", ".join(map(str, numbers))
    return f"the host has {len(gpus.cards)} {kind}, numbered {numbering}"


def _named_device(slot: Slot) -> int | None:
    """Return the number in the slot's model_device, such as cuda:1; None without a number."""
    _, colon, number = slot.settings.model.device.partition(":")
    return int(number) if colon else None


def _named_devices(slots: Iterable[Slot]) -> set[int]:
    return {number for number in map(_named_device, slots) if number is not None}


def with_families(
    services: Mapping[str, Settings],
    slots: Collection[Slot],
) -> dict[str, Settings]:
    """Return the coordinator's services with all workers' task families in the keeper's settings.

    Its audits recreate tasks from recipes that name a family's configuration by digest, so they
    must know every configuration; workers' levels and weights do not matter for them. Families in
    the host's own data are included too.
    """
    if "keeper" not in services or not slots:
        return dict(services)
    keeper = services["keeper"]
    own = keeper.environment.families if "families" in keeper.environment.model_fields_set else ()
    known = {_key(family): family for family in own}
    for slot in slots:
        for family in slot.settings.environment.families:
            known.setdefault(_key(family), Family(name=family.name, config=family.config))
    environment = Environment(families=tuple(known.values()))
    return {**services, "keeper": keeper.model_copy(update={"environment": environment})}


def with_answers(
    services: Mapping[str, Settings],
    slots: Sequence[Slot],
) -> dict[str, Settings]:
    """Return the services of a host whose dashboard shows its owner the answers of its slots.

    `dashboard_node_dirs` in the host's own data decides otherwise.
    """
    dashboard = services.get("dashboard")
    if dashboard is None or "node_dirs" in dashboard.dashboard.model_fields_set:
        return dict(services)
    folders = tuple(slot.settings.node.state_dir for slot in slots)
    section = dashboard.dashboard.model_copy(update={"node_dirs": folders})
    return {**services, "dashboard": dashboard.model_copy(update={"dashboard": section})}


def _key(family: Family) -> tuple[str, str]:
    return family.name, json.dumps(family.config, sort_keys=True)

"""Checks of the slots of a host: their number, their keys and their settings."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploys.inventory import secret_files
from deploys.inventory.derived_settings import (
    SLOT_KEYS,
    hint,
    is_downloaded,
    section_of,
    slot_settings,
)
from deploys.inventory.host_plan import COORDINATORS, WORKERS, HostEntry
from deploys.inventory.schema import AUTO, SLOTS_MAY_BE, Deployment, pick, problems_of
from deploys.inventory.slots import Slot, SlotOptions
from deploys.services import DERIVED, WORKER_SECTIONS
from worker import settings

NO_SWARM = (
    f"no swarm to join; put a host into {COORDINATORS}, or set chain_account_url to a swarm's"
    " account service, or swarm_bootnodes to peers of one (swarm_enabled False: train alone, on"
    " purpose)"
)
NO_TRACKERS_OFFLINE = (
    "tracking: a wheelhouse does not have the trackers' packages; switch them off, or set"
    " release_source to repository"
)
SET_BY_DEPLOY = "set by the deploy for each role and slot; leave it out"
# The rule of huggingface_hub, which is not installed on the operator's side.
_HUB_NAME = re.compile(r"(?!.*(--|[.][.]|[.]git$))(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b")


def wrong_number(entry: HostEntry, deployment: Deployment) -> str | None:
    """Return the mistake in the host's number of slots, given its groups and device, or None."""
    count = entry.data.get("slots")
    if WORKERS not in entry.groups:
        if count is None:
            return None
        return f"slots: got {count!r}, but not in {WORKERS}; put the host there, or leave slots out"
    if count is None:
        return f"slots: none; expected {SLOTS_MAY_BE}, for a host in {WORKERS}"
    device = entry.data.get("model_device")
    if deployment.slots == AUTO and isinstance(device, str) and ":" in device:
        return (
            f"model_device: got {device!r}, and slots auto, which is a worker for each GPU;"
            " expected auto, cuda or cpu"
        )
    return None


def make_slots(
    entry: HostEntry,
    deployment: Deployment,
    account_url: str | None,
    must_find_swarm: bool,
) -> tuple[list[Slot], list[str]]:
    """Return the slots of a host without those that have mistakes, and all mistakes.

    `must_find_swarm`: the inventory has no coordinator, so its workers need another way.
    """
    slots, messages = [], []
    for number, own in enumerate(deployment.overrides):
        flat = slot_settings(entry, number, own, account_url)
        if must_find_swarm and _is_lonely(flat):
            messages.append(NO_SWARM)
        slot, problems = _slot(entry, number, own, flat)
        for message in (*_misplaced(own), *problems):
            messages.append(f"slot {number}: {message}")
        if slot is not None:
            slots.append(slot)
    return slots, messages


def _is_lonely(flat: Mapping[str, Any]) -> bool:
    """Return whether a worker with these settings should find others, but cannot."""
    if flat.get("swarm_enabled", True) is not True:
        return False
    ways = ("chain_account_url", "chain_rpc_url", "swarm_bootnodes")
    return not any(flat.get(way) for way in ways)


def _slot(
    entry: HostEntry,
    number: int,
    own: Mapping[str, Any],
    flat: Mapping[str, Any],
) -> tuple[Slot | None, list[str]]:
    """Return a slot with the settings `flat`, or None, and its mistakes."""
    options, problems = _slot_options(entry, own)
    unknown = [key for key in own if not (key in SLOT_KEYS or section_of(key))]
    known = [*SLOT_KEYS, *settings.flat_keys()]
    problems += [f"{key}: not a known key of a slot; {hint(key, known)}" for key in unknown]
    problems += wrong_values(own)
    flat = pick(flat, flat.keys() - unknown)
    tokens = {key: own.get(key, entry.data.get(key)) for key in secret_files.TOKENS}
    problems += settings.flat_mistakes(flat)
    problems += secret_files.mistakes(tokens)
    if entry.data.get("release_source") == "wheelhouse" and _has_tracker(flat):
        problems.append(NO_TRACKERS_OFFLINE)
    if problems:
        return None, problems
    slot = Slot(
        number,
        settings.from_flat(flat, ""),
        identity=_file(own.get("identity")),
        options=options,
        secrets={key: Path(str(tokens[key])) for key in secret_files.SLOT_SECRETS if tokens[key]},
        model_token=_file(tokens["model_token_file"]),
    )
    return slot, []


def _has_tracker(flat: Mapping[str, Any]) -> bool:
    keys = ("tracking_trackio", "tracking_tensorboard")
    return any(flat.get(key) for key in keys) or flat.get("tracking_wandb", "off") != "off"


def _file(name: object) -> Path | None:
    return Path(str(name)) if name else None


def _misplaced(own: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys of a slot that cannot be set for a slot."""
    for key in sorted(DERIVED & set(own)):
        yield f"{key}: {SET_BY_DEPLOY}"
    for key in sorted(own):
        section = section_of(key)
        if section and section not in WORKER_SECTIONS:
            yield f"{key}: no worker reads it; put it into the data of the {COORDINATORS} host"


def _slot_options(
    entry: HostEntry,
    own: Mapping[str, Any],
) -> tuple[SlotOptions, list[str]]:
    """Return a slot's share of the machine and its mistakes; the host's own keys are defaults."""
    mine = pick(own, SlotOptions.model_fields)
    problems = []
    device = own.get("model_device", entry.data.get("model_device", "auto"))
    if mine.get("gpu") is not None and device not in ("auto", "cuda"):
        problems.append(
            f"gpu: got {mine['gpu']}, and model_device {device!r}; expected one of them"
        )
    try:
        SlotOptions(**mine)
    except ValidationError as error:
        return SlotOptions(), [*problems, *problems_of(error)]
    of_host = pick(entry.data, SlotOptions.model_fields)
    try:
        return SlotOptions(**of_host | mine), problems
    except ValidationError:
        # The host's own keys are wrong, which the check of the host reports.
        return SlotOptions(**mine), problems


def wrong_values(data: Mapping[str, Any]) -> Collection[str]:
    """Return mistakes in model names that have the right type but cannot exist."""
    name = data.get("model_name")
    if not isinstance(name, str) or not is_downloaded(name) or _HUB_NAME.fullmatch(name):
        return ()
    return (
        f"model_name: got {name!r}, neither a folder nor a Hugging Face name (owner/model);"
        " expected such a name, a folder's whole path, hivewright/tiny or auto",
    )

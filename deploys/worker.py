"""The workers of a host; each slot has one identity and one service."""

import base64
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

from pyinfra import host
from pyinfra.api import FunctionCommand, StringCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.operations import files

from deploys import host_files, node_identity, paths, units
from deploys.backup_pack import WORKER_FILES, WORKER_FOLDERS
from deploys.facts import ConfiguredSlots, Service
from deploys.inventory import secret_files
from deploys.inventory.host_plan import Planned
from deploys.inventory.secret_files import SLOT_SECRETS
from deploys.inventory.slots import Slot
from deploys.paths import (
    CACHE,
    CONFIGURATION,
    DEPLOYED,
    LOGS,
    MODELS,
    RETIRED,
    USER,
    state_dir,
)
from deploys.pyinfra_ext import fact_cache
from deploys.services import ENROL_UNIT, GPU_UNIT, WORKER_UNIT, enrol_unit, worker_unit
from deploys.slot_command import MODEL_TOKEN, as_slot, folders_of_slot
from worker.runtime.state_dir import StateDir

EXAMINE_SECONDS = 600
# If the download of a model takes longer, the next deploy resumes it.
FETCH_SECONDS = 3000
# Files of a removed slot that are kept: identity and ledger, with the ledger's write-ahead log.
# Files that a move has set aside are kept too, because the move may be undone.
KEPT = (
    *(f"{name}{ending}" for name in (*WORKER_FILES, *WORKER_FOLDERS) for ending in ("", ".moved")),
    "ledger.db-wal",
    "ledger.db-shm",
)


@deploy("Worker")
def configure_workers(plan: Planned) -> None:
    """Install settings, identity and service of each slot, and start it."""
    node_identity.install_enrolment_token(plan)
    unit = units.install_unit(WORKER_UNIT, plan.host.deployment.watchdog_seconds)
    units.install_unit(ENROL_UNIT, plan.host.deployment.watchdog_seconds)
    if any(slot.needs_device_files for slot in plan.host.slots):
        units.install_unit(GPU_UNIT, plan.host.deployment.watchdog_seconds)
    for slot in host.loop(plan.host.slots):
        state_dir = slot.settings.node.state_dir
        files.directory(
            name=f"Make {state_dir}", path=str(state_dir), user=USER, group=USER, mode="700"
        )
        settings = units.install_settings(slot.file, slot.settings)
        node_identity.restore_key(slot)
        share = slot.enrol_settings()
        units.drop_in(
            name=f"Show slot {slot.number} its GPU",
            unit=enrol_unit(slot.number),
            text=share,
        )
        node_identity.enrol(
            name=f"Enrol slot {slot.number}", slot=slot, _timeout=node_identity.ENROL_SECONDS
        )
        secrets = install_secrets(slot)
        share = slot.unit_settings()
        unused = [slot.secret_file(key) for key in SLOT_SECRETS if key not in slot.secrets]
        name = f"Give slot {slot.number} its share of the machine"
        given = units.drop_in(name=name, unit=slot.unit, text=share, unused=unused)
        digest = units.digest(plan.commit, unit.text, settings.text, share, *secrets)
        if slot.settings.model.shared_dir is not None:
            fetch(
                name=f"Fetch the model of slot {slot.number}",
                slot=slot,
                digest=digest,
                _timeout=FETCH_SECONDS,
            )
        examine(
            name=f"Examine the machine for slot {slot.number}",
            slot=slot,
            digest=digest,
            _timeout=EXAMINE_SECONDS,
        )
        units.running(
            name=f"Run slot {slot.number}",
            unit=slot.unit,
            digest=digest,
            has_new_files=unit.is_new or settings.is_new or given.will_change,
            _timeout=units.RESTART_SECONDS,
        )


@deploy("Worker")
def retire_workers(plan: Planned) -> None:
    """Stop slots that are no longer in the inventory, on every host."""
    retire(
        name="Stop slots that are no longer there",
        numbers=[slot.number for slot in plan.host.slots],
    )


def install_secrets(slot: Slot) -> list[str]:
    """Write the slot's secrets to files that only root can read; return their digests."""
    digests = []
    for key, local in sorted(slot.secrets.items()):
        text = secret_files.token(key, local).encode() + b"\n"
        name = f"Write {SLOT_SECRETS[key]} of slot {slot.number}"
        host_files.file(name=name, path=slot.secret_file(key), content=text, mode="600")
        digests.append(hashlib.sha256(text).hexdigest())
    return digests


@operation()
def fetch(
    slot: Slot,
    digest: str,
) -> Iterator[FunctionCommand]:
    """Download the slot's model to the shared folder, before its service starts with something new.

    The output is shown while it runs, since a download may take long.
    """
    if host.get_fact(Service, unit=slot.unit).digest == digest:
        host.noop(f"slot {slot.number} is to run as it does")
        return
    yield FunctionCommand(_fetch, (slot,), {})


def _fetch(
    state: State,
    host: Host,
    slot: Slot,
) -> bool:
    token = (
        None
        if slot.model_token is None
        else secret_files.token("model_token_file", slot.model_token)
    )
    arguments = {**fact_cache.arguments_of_facts(host), "_timeout": FETCH_SECONDS}
    if token is not None:
        arguments["_stdin"] = [base64.b64encode(f"{token}\n".encode()).decode()]
    script = StringCommand(fetch_script(slot))
    is_done, _ = host.run_shell_command(script, print_output=True, **arguments)
    return bool(is_done)


def fetch_script(slot: Slot) -> str:
    """Return shell commands that download the model as the services' user.

    The download sees only the file with the chosen model of the slot's folder. A token comes
    through standard input, stays in memory, and is visible only to this unit.
    """
    properties = (
        f"RuntimeMaxSec={FETCH_SECONDS}",
        f"CacheDirectory=hivewright/{MODELS.name}",
        f"BindPaths={MODELS}",
        f"BindReadOnlyPaths=-{StateDir(state_dir(slot.number)).model_choice}",
        # Files in a slot's own home must not affect models that other slots read.
        "Environment=HOME=/tmp",
    )
    if slot.model_token is None:
        return as_slot(slot.number, "fetch", *properties)
    credential = f"/run/hivewright-fetch-{slot.number}.token"
    run = as_slot(slot.number, "fetch", *properties, f"LoadCredential={MODEL_TOKEN}:{credential}")
    return (
        f"umask 077; trap 'rm -f {credential}' EXIT; base64 -d > {credential} || exit 1; umask 022;"
        f" {run}"
    )


@operation()
def examine(
    slot: Slot,
    digest: str,
) -> Iterator[str]:
    """Check the machine with `hivewright doctor` before the service starts with something new.

    Runs with the slot's own limits. A failed check stops the deploy of this host; a running service
    keeps running.
    """
    if host.get_fact(Service, unit=slot.unit).digest == digest:
        host.noop(f"slot {slot.number} is to run as it does")
        return
    yield (
        f'said=$({{ {examine_script(slot)}; }} 2>&1) || {{ code=$?; echo "$said" >&2;'
        " echo 'the service was not started with this' >&2; exit $code; }"
    )


def examine_script(slot: Slot) -> str:
    """Return shell commands that run the doctor as the slot's user, with its limits and GPU."""
    limit = f"RuntimeMaxSec={EXAMINE_SECONDS}"
    return as_slot(slot.number, "doctor", limit, *folders_of_slot(slot.number))


@operation()
def retire(numbers: Collection[int]) -> Iterator[str]:
    """Remove all slots but these; identity and ledger of a removed slot are kept in RETIRED."""
    for number in host.get_fact(ConfiguredSlots):
        if number not in numbers:
            unit = worker_unit(number)
            yield f"systemctl disable --now --quiet {unit}"
            yield keep_identity_script(state_dir(number), RETIRED)
            yield (
                f"rm -rf {DEPLOYED}/{unit} {CONFIGURATION}/worker-{number}.*"
                f" {CACHE}/worker-{number} {LOGS}/worker-{number} && {units.remove_drop_in(unit)}"
                f" && {units.remove_drop_in(enrol_unit(number))} && systemctl daemon-reload"
            )


def keep_identity_script(state: Path, retired: Path) -> str:
    """Return shell commands that move a slot's identity and ledger away, and remove the rest.

    The services' user makes the copy: root would follow links that this user may have put there.
    """
    copy = (
        f"cd {state} && for file in {' '.join(KEPT)}; do [ ! -e $file ] || cp -RpP $file $kept;"
        " done"
    )
    key = f"{state}/{paths.KEY_FILE}"
    return (
        f"set -eu; [ -d {state} ] || exit 0; kept={retired}/{state.name}-$(date +%Y%m%dT%H%M%S);"
        f" if [ -e {key} ] || [ -e {key}.moved ]; then install -d -m 700 -o {USER} -g {USER} $kept;"
        f" kept=$kept runuser -u {USER} -- sh -euc '{copy}'; sync $kept; fi; rm -rf {state}"
    )

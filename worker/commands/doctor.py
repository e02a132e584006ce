"""`hivewright doctor`: check whether this machine meets the requirements of a worker's settings.

Every finding is ok, a warning (it works badly, or does not work yet) or a refusal (it can't work),
with its cause and the exact fix. Nothing is changed: no key is made and no round is trained; a
running worker continues.
"""

import argparse
import dataclasses
import ipaddress
import json
import os
import re
import shutil
import socket
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from worker import __version__, enrolment, environments
from worker.chain import account_client
from worker.chain.coordinator import Coordinator
from worker.commands import bundle
from worker.errors import BadAnswer, ChainUnreachable, ResourceError, WorkerError
from worker.log import discreet, printable
from worker.policy import device, engine_forecast, model_sizing
from worker.runtime import gpu_health, host, host_memory, tailscale_key
from worker.runtime.state_dir import StateDir
from worker.settings import Model, Settings, chain_of_node
from worker.swarm.transport import reachability as swarm_probe
from worker.telemetry import gpu_watch, status
from worker.trainer import micro_batch

DISK_PROBE_MB = 64
SLOW_DISK_MB_S = 50.0
"""At this speed a checkpoint of half a billion parameters takes a minute."""
SMALL_RAM_GIB, TIGHT_RAM_GIB = 1.0, 2.0
CLOCK_SECONDS = 3.0
"""Larger offsets make peers and this node disagree on the age of records in the DHT."""

Verdict = Literal["ok", "warning", "refuse"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `fix`: what to do; empty if all is well."""

    check: str
    verdict: Verdict
    cause: str
    fix: str = ""


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Print all findings. Raises ResourceError if any of them refuses."""
    findings = list(examine(settings))
    records = [dataclasses.asdict(finding) for finding in findings]
    if options.bundle is not None:
        bundle.write(options.bundle, settings, records)
    if options.json:
        print(json.dumps(records, indent=2))
    else:
        _print(findings)
    refusals = [finding.check for finding in findings if finding.verdict == "refuse"]
    if refusals:
        raise ResourceError(
            f"{len(refusals)} of {len(findings)} checks refuse: {', '.join(refusals)}; see above"
        )


def examine(settings: Settings) -> Iterator[Finding]:
    """Run every check; each takes its own time-out at most."""
    patient = Patient(settings, _running_pid(settings.node.state_dir))
    for check in CHECKS:
        for finding in _findings(check, patient):
            yield dataclasses.replace(
                finding, cause=discreet(finding.cause), fix=discreet(finding.fix)
            )


def _findings(
    check: Callable[["Patient"], Iterator[Finding]], patient: "Patient"
) -> Iterator[Finding]:
    try:
        yield from check(patient)
    except WorkerError as error:
        # The errors with which a worker would stop have cause and fix in one line.
        cause, _, fix = str(error).partition("; ")
        is_away = isinstance(error, ChainUnreachable) and not isinstance(error, BadAnswer)
        verdict: Verdict = "warning" if is_away else "refuse"
        yield Finding(check.__name__.removeprefix("_"), verdict, printable(cause), printable(fix))


@dataclass(frozen=True, slots=True)
class Patient:
    """The settings to check. `pid`: the worker that runs with them; None: no worker runs."""

    settings: Settings
    pid: int | None

    @property
    def folder(self) -> Path:
        return self.settings.node.state_dir


def _running_pid(folder: Path) -> int | None:
    if not StateDir(folder).lock.exists():
        return None
    try:
        host.lock_folder(folder, "node.state_dir").close()
    except ResourceError:
        text = StateDir(folder).lock.read_text().strip()
        return int(text) if text.isdecimal() else 0
    return None


def _identity(patient: Patient) -> Iterator[Finding]:
    identity, enrolled = enrolment.load(patient.settings)
    where = "registered on the chain" if enrolled.registered else "without a chain"
    yield Finding("identity", "ok", f"{identity.peer_id}, {where}")


def _device(patient: Patient) -> Iterator[Finding]:
    for line in device.sick_cards():
        cause = f"a GPU of this machine does not work: {line}"
        yield Finding("device", "warning", cause, "reset or replace it, and see the kernel's log")
    cards = gpu_health.parse(gpu_health.query())
    for card in cards:
        name = f"{card.name or 'GPU'} at {card.bus_id}"
        for problem in card.problems:
            yield Finding("device", "warning", f"{name}: {problem.text}", problem.action)
    machine = model_sizing.measure(patient.settings.model)
    name, seconds = device.compute(machine.device, machine.dtype)
    yield Finding(
        "device", "ok", f"{name} ({machine.device}) computes and differentiates in {seconds:.2f} s"
    )
    uuid = device.gpu_uuid(machine.device)
    own = None if uuid is None else gpu_watch.choose(cards, uuid)
    if own is not None and own.is_ill:
        cause = f"the worker's own card must not train: {gpu_watch.describe(own)}"
        yield Finding("device", "refuse", cause, "then start the worker again")


def _model(patient: Patient) -> Iterator[Finding]:
    model = model_sizing.settle(patient.settings.model, patient.folder)
    generation = patient.settings.generation
    model_sizing.require_context(model, generation)
    if model_sizing.find_folder(model) is not None:  # otherwise it is not downloaded yet
        outlook = engine_forecast.read(model)
        if outlook.refuses(generation):
            cause = f"{model.name} ({outlook.model_type}) can't be trained here: {outlook.reason}"
            fix = "choose another model.name; `hivewright check --model NAME` judges one"
            yield Finding("model", "refuse", cause, fix)
            return
    tokens = f"{generation.max_prompt_length} + {generation.max_completion_length} tokens"
    yield Finding("model", "ok", f"{model.name}, prompt and completion of {tokens}")


def _memory(patient: Patient) -> Iterator[Finding]:
    """Compare free memory with the worst step measured, or with the model's size."""
    machine = model_sizing.measure(patient.settings.model)
    model = model_sizing.settle(patient.settings.model, patient.folder)
    free = f"{machine.free_gib:.1f} GiB free on {machine.device}"
    measured = _recall_budget(StateDir(patient.folder).budget, model, machine.dtype)
    if measured is not None:
        yield _against_worst_step(patient, measured, machine.free_gib, free)
        return
    needed = model_sizing.needed_gib(model, machine, patient.settings.trainer)
    if needed is None:
        yield Finding("memory", "ok", f"{model.name} is measured when the worker has it; {free}")
    elif needed <= machine.free_gib or patient.pid is not None:
        yield Finding("memory", "ok", f"{model.name} needs about {needed:.1f} GiB; {free}")
    else:
        fix = (
            "free memory, set trainer.lora, or choose a smaller model.name (`hivewright check`"
            " lists what fits)"
        )
        yield Finding("memory", "refuse", f"{model.name} needs about {needed:.1f} GiB; {free}", fix)


def _recall_budget(
    file: Path,
    model: Model,
    dtype: str,
) -> micro_batch.Budget | None:
    """Return the measured budget of the model; small models are float32 with dtype `auto`."""
    dtypes = (dtype, "float32") if model.dtype == "auto" else (dtype,)
    found = (micro_batch.recall(file, f"{model.name} torch.{each} ") for each in dtypes)
    return next((budget for budget in found if budget is not None), None)


def _against_worst_step(
    patient: Patient, measured: micro_batch.Budget, free_gib: float, free: str
) -> Finding:
    how = "layers computed again" if measured.recomputes else "layers kept"
    limit = patient.settings.trainer.max_tokens_per_micro_batch
    said = f"worst step measured here: {measured.tokens} of {limit} tokens at once, {how}"
    if measured.held is None or measured.step is None:
        return Finding("memory", "ok", f"{said}; {free}")
    held, step = measured.held / model_sizing.GIB, measured.step / model_sizing.GIB
    said += f", {held:.1f} + {step:.1f} GiB; {free}"
    if patient.pid is not None or held + step <= free_gib:
        return Finding("memory", "ok", said)
    if held <= free_gib:
        fix = "end other programs there, or accept a lower token budget and slower steps"
        return Finding("memory", "warning", said, fix)
    fix = "end other programs there, set trainer.lora, or choose a smaller model"
    return Finding("memory", "refuse", said, fix)


def _ram(patient: Patient) -> Iterator[Finding]:
    free = model_sizing.free_ram_gib()
    fix = "end other programs, or raise the slot's memory limit"
    if patient.pid is not None or free >= TIGHT_RAM_GIB:
        yield Finding("ram", "ok", f"{free:.1f} GiB free")
    elif free >= SMALL_RAM_GIB:
        cause = f"{free:.1f} GiB free; a worker needs {TIGHT_RAM_GIB:g} besides its model"
        yield Finding("ram", "warning", cause, fix)
    else:
        cause = f"{free:.1f} GiB free; a worker does not start with less than {SMALL_RAM_GIB:g}"
        yield Finding("ram", "refuse", cause, fix)


def _pressure(patient: Patient) -> Iterator[Finding]:
    stalled = host_memory.read().stalled
    said = host_memory.show_stalled(stalled)
    if stalled is not None and stalled > host_memory.STALLED:
        yield Finding("pressure", "warning", said, host_memory.LESS_USE)
    else:
        yield Finding("pressure", "ok", said)


def _disk(patient: Patient) -> Iterator[Finding]:
    host.require_disk(patient.folder, patient.settings.node.min_free_disk_mb)
    free_gb = shutil.disk_usage(patient.folder).free / 10**9
    speed = _disk_speed(patient.folder)
    said = f"{free_gb:.1f} GB free in {patient.folder}, {speed:.0f} MB/s written"
    if speed < SLOW_DISK_MB_S:
        fix = "checkpoints delay training: raise node.checkpoint_every, or use an SSD"
        yield Finding("disk", "warning", said, fix)
    else:
        yield Finding("disk", "ok", said)


def _disk_speed(folder: Path) -> float:
    """Return the disk's speed in 10^6 bytes per second, fsync included."""
    file = folder / f".doctor-{os.getpid()}"
    block = os.urandom(10**6)
    began = time.monotonic()
    try:
        with file.open("wb") as stream:
            for _ in range(DISK_PROBE_MB):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror}; make room or rights there") from None
    finally:
        file.unlink(missing_ok=True)
    return DISK_PROBE_MB / (time.monotonic() - began)


def _port(patient: Patient) -> Iterator[Finding]:
    swarm = patient.settings.swarm
    if not swarm.port:
        yield Finding("port", "ok", "swarm.port is 0: the kernel chooses")
    elif patient.pid is not None:
        yield Finding("port", "ok", f"{swarm.port} is used by this worker, process {patient.pid}")
    else:
        host.require_port(swarm.host, swarm.port, "swarm.port")
        yield Finding("port", "ok", f"{swarm.port} is free")


def _account(patient: Patient) -> Iterator[Finding]:
    if patient.settings.chain.account_url is None:
        yield Finding("account", "ok", "no account service: this node earns nothing")
        return
    chain = patient.settings.chain
    info = account_client.AccountClient(chain, patient.folder).swarm()
    yield Finding("account", "ok", f"{chain.account_url} sends from {info.account}")


def _chain(patient: Patient) -> Iterator[Finding]:
    chain = patient.settings.chain
    if chain.account_url is None and chain.rpc_url is None:
        yield Finding("chain", "ok", "none: rounds are counted here")
        return
    coordinator = Coordinator(chain_of_node(chain, patient.folder))
    coordinator.check()
    said = f"round {coordinator.current_round()}, contract {coordinator.deployment.contract}"
    if coordinator.version is not None:
        yield Finding("chain", "ok", f"{said}, {coordinator.version}")
    else:
        missing = "; ".join(coordinator.abilities.missing)
        said += f", not ours: like release {coordinator.abilities.release} of RL Swarm"
        yield Finding("chain", "ok", f"{said}, without {missing}" if missing else said)
    if chain.account_url is not None:
        identity, _ = enrolment.load(patient.settings)
        owner = coordinator.owner_of(identity.peer_id)
        ours = account_client.AccountClient(chain, patient.folder).swarm()
        if owner is None:
            cause = f"{identity.peer_id} is not registered on this chain"
            fix = "run `hivewright enrol` with these settings"
            yield Finding("registration", "refuse", cause, fix)
        else:
            account_client.require_owner(identity.peer_id, owner, ours.account)


def _tailscale(patient: Patient) -> Iterator[Finding]:
    expires_at = tailscale_key.expires_at()
    trouble = tailscale_key.problem(expires_at, time.time())
    if trouble is not None:
        cause, _, fix = trouble.partition("; ")
        yield Finding("tailscale", "warning", cause, fix)
    else:
        when = "no key of this host expires"
        if expires_at is not None:
            when = f"the key expires in {(expires_at - time.time()) / 86400:.0f} days"
        yield Finding("tailscale", "ok", when)


def _clock(patient: Patient) -> Iterator[Finding]:
    url = patient.settings.chain.account_url
    if url is None:
        yield Finding("clock", "ok", "no account service to compare it with")
        return
    theirs, ours = account_client.server_time(url, patient.settings.chain.timeout_seconds)
    try:
        offset = ours - parsedate_to_datetime(theirs).timestamp()
    except (ValueError, OverflowError):
        raise BadAnswer(
            f"{url}: its Date header is {theirs!r}; expected hivewright's account service"
        ) from None
    direction = "ahead of" if offset > 0 else "behind"
    said = f"{abs(offset):.0f} s {direction} the account service's"
    if abs(offset) <= CLOCK_SECONDS:
        yield Finding("clock", "ok", f"within {CLOCK_SECONDS:g} s of the account service's")
    else:
        yield Finding("clock", "warning", said, "let NTP set both: `timedatectl set-ntp true`")


def _dht(patient: Patient) -> Iterator[Finding]:
    if not patient.settings.swarm.enabled:
        yield Finding("dht", "ok", "swarm.enabled is false: this node trains alone")
        return
    addresses = list(patient.settings.swarm.bootnodes)
    if patient.settings.chain.account_url or patient.settings.chain.rpc_url:
        chain = chain_of_node(patient.settings.chain, patient.folder)
        published = Coordinator(chain).bootnodes()
        addresses += [address for address in published if address not in addresses]
    if not addresses:
        fix = "set swarm.bootnodes, or start the swarm's keeper"
        yield Finding("dht", "warning", "no bootnodes are known", fix)
        return
    reasons = swarm_probe.reach(addresses)
    failed = {address: reason for address, reason in reasons.items() if reason is not None}
    if len(failed) < len(reasons):
        num_answering = len(reasons) - len(failed)
        yield Finding("dht", "ok", f"{num_answering} of {len(reasons)} bootnodes answer")
    else:
        address, reason = next(iter(failed.items()))
        fix = (
            "let this host connect to it (firewall, VPN), or start the bootnode; until then this"
            " node trains alone"
        )
        # libp2p's errors have several lines, and the last is the cause.
        *_, last_line = ["no reason is given", *reason.strip().splitlines()]
        said = printable(last_line.strip(" *"))
        yield Finding("dht", "warning", f"no bootnode answers: {printable(address)}: {said}", fix)


def _announced(patient: Patient) -> Iterator[Finding]:
    """Compare the announced address with the one that this machine sends from."""
    swarm, target = patient.settings.swarm, _somebody(patient.settings)
    seen = _source_address(target) if target else None
    if seen is None:
        yield Finding("announced", "ok", "no host of the swarm is known")
        return
    if ipaddress.ip_address(seen).is_loopback:
        yield Finding("announced", "ok", "all known hosts of the swarm are this machine")
        return
    announced = re.findall(r"/ip[46]/([^/]+)", " ".join(swarm.announce))
    if not swarm.announce:
        here, there = ipaddress.ip_address(seen), target and _is_public(target)
        if here.is_private and there:
            cause = f"seen from {seen}, which peers elsewhere can't dial"
            fix = (
                "forward a port to swarm.port and put its outer address into swarm.announce, or use"
                " a VPN"
            )
            yield Finding("announced", "warning", cause, fix)
        else:
            yield Finding("announced", "ok", f"libp2p announces its own; seen from {seen}")
    elif announced and seen not in announced:
        shown = ", ".join(announced)
        fix = f"verify that {shown} is forwarded here, or put {seen} into swarm.announce"
        yield Finding("announced", "warning", f"announced is {shown}, seen from {seen}", fix)
    else:
        yield Finding("announced", "ok", f"{', '.join(swarm.announce)}, seen from {seen}")


def _somebody(settings: Settings) -> str | None:
    """Return a host of the swarm that this node connects to; None: none is known."""
    if settings.chain.account_url:
        return urlsplit(settings.chain.account_url).hostname
    found = re.search(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)", " ".join(settings.swarm.bootnodes))
    return found[1] if found else None


def _source_address(target: str) -> str | None:
    """Return the source address of packets to `target`; None without a route. Sends nothing."""
    try:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)
        kind, _, _, _, address = found[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe_socket:
            probe_socket.connect(address)
            source, *_ = probe_socket.getsockname()
            return str(source)
    except OSError:
        return None


def _is_public(target: str) -> bool:
    try:
        found = socket.getaddrinfo(target, 9)
    except OSError:
        return False
    _, _, _, _, address = found[0]
    return ipaddress.ip_address(address[0]).is_global


def _versions(patient: Patient) -> Iterator[Finding]:
    """Compare versions of the task families with those of peers met before.

    A node can't learn from peers with other versions.
    """
    ours = ", ".join(environments.load(patient.settings.environment).versions)
    node = status.read(patient.folder)
    others = node.swarm.other_versions if node and node.swarm else {}
    if not others:
        cause = f"hivewright {__version__}, {ours}; no peer is known to differ"
        yield Finding("versions", "ok", cause)
        return
    counts = sorted(others.items())
    theirs = ", ".join(f"{count} peers run {printable(version)}" for version, count in counts)
    fix = "upgrade the older ones: deploy them again"
    yield Finding("versions", "warning", f"{theirs}, this node {ours}", fix)


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _identity,
    _device,
    _model,
    _memory,
    _ram,
    _pressure,
    _disk,
    _port,
    _account,
    _chain,
    _clock,
    _tailscale,
    _dht,
    _announced,
    _versions,
)


def _print(findings: list[Finding]) -> None:
    """Wrap findings to the terminal; elsewhere print each on one line, for grep."""
    width = sys.maxsize
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * 24, break_on_hyphens=False)
    for finding in findings:
        print(wrapper.fill(f"{finding.verdict:<8} {finding.check:<12}  {finding.cause}"))
        if finding.fix:
            print(wrapper.fill(f"{'':<22} fix: {finding.fix}"))
    counts = Counter(finding.verdict for finding in findings)
    print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['refuse']} refused")
    sys.stdout.flush()

"""Facts for fleet commands: progress, resources and logs of a host's services.

A host whose answer is incomplete has no value (None), so that a silent worker never counts as a
healthy one. The host's tools may fail: an unusable answer is reported for the host (`problem`) and
never guessed.
"""

import json
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from pyinfra.api import FactBase

from deploys import gpus, mesh, safe_read
from deploys.facts import WireGuard
from deploys.paths import (
    CACHE,
    COMMAND,
    CONFIGURATION,
    CURRENT,
    DEPLOYED,
    LOGS,
    PREVIOUS,
    ROOT,
    STATE,
    UNITS,
    WHOLE,
)
from deploys.services import COORDINATOR_ROLES, COORDINATOR_SERVICES
from worker.runtime import gpu_health, host_memory, tailscale_key
from worker.runtime.state_dir import StateDir

# Number of a worker's last rounds that are read.
NUM_ROUNDS = 8
# The last line of a complete answer.
END = "end"
# Time limit for one tool, so that a driver or daemon that hangs does not prevent other answers.
WITHIN = "timeout --kill-after=2 15"
_LONGEST_PROBLEM = 160
# Length of the log that is searched for the reason of an end, and of the part that is shown.
NUM_WORDS = 40
_LONGEST_WORDS = 300
# A traceback's last line, hivewright's own last line, and messages of C libraries.
_ERROR = re.compile(
    r"^[\w.]*(Error|Exception|Interrupt|Exit)\b|\w+Error \(exit \d+\)|\b(error|fatal|panicked)\b",
    re.I,
)
# For a shell's `case`: the units that read a role's settings file.
_UNITS_OF_ROLES = " ".join(
    f"{role}) units='{' '.join(each.unit for each in COORDINATOR_SERVICES if each.role == role)}';;"
    for role in COORDINATOR_ROLES
)

T = TypeVar("T")


class Answer(FactBase[T | None], Generic[T]):
    """A fact whose output ends with a line END; it is None if that line is missing."""

    def process(
        self,
        output: list[str],
    ) -> T | None:
        return self.read(output[:-1]) if output[-1] == END else None

    def read(self, lines: list[str]) -> T:
        """Parse the output without its last line."""
        raise NotImplementedError


class _Read(BaseModel):
    """The fields of a status.json that fleet commands read; the file has more."""

    model_config = ConfigDict(strict=True)

    state: str
    round: int | None


class _Exchange(BaseModel):
    peers_known: int = 0


class _Finding(BaseModel):
    check: str
    severity: str
    text: str


class _WorkerStatus(_Read):
    reward_mean: float | None
    peers_heard: int
    ledger: dict[str, int]
    animal_name: str
    updated_at: FiniteFloat
    device: str | None = None
    swarm: _Exchange | None = None
    warnings: list[_Finding] = []


class _KeeperStatus(_Read):
    reporters: int
    expected: int


class _Finished(NamedTuple):
    """A finished round: its time in seconds since 1970, and its mean reward (None: unknown)."""

    at: float
    reward: float | None


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A service of a host and its progress.

    `status`: the status.json of its state folder, None if it wrote none. `started_at`: its last
    start by the host's clock, in seconds since 1970, 0 if it does not run. `restarts`: restarts by
    systemd since it was started by hand. `exit_status`: of its last end. `finished`: when its last
    rounds were finished, oldest first, at most NUM_ROUNDS, without rounds that had non-finite
    values. `rewards`: the mean rewards of these rounds, None if not recorded. `problem`: why
    `status` is None although the file exists. `last_words`: the log line that best explains its
    last end, if it is not running or was restarted by systemd. `result`: systemd's word for its
    last end, such as "oom-kill"; "success" while it runs.
    """

    unit: str
    active_state: str
    status: dict[str, Any] | None
    started_at: float = 0.0
    restarts: int = 0
    exit_status: int = 0
    finished: tuple[float, ...] = ()
    rewards: tuple[float | None, ...] = ()
    problem: str | None = None
    last_words: str | None = None
    result: str | None = None


class NodeReports(Answer[list[dict[str, Any]]]):
    """A NodeReport, as a dict, for each service that is configured on the host."""

    def command(self) -> str:
        show = (
            f"TZ=UTC {WITHIN} systemctl show"
            " --property=ActiveState,ActiveEnterTimestamp,NRestarts,ExecMainStatus,Result"
        )
        finished = (
            f"own_file {STATE}/$role/{StateDir.rounds} | tail -n {NUM_ROUNDS}"
            ' | grep -v \'"skipped": "non-finite"\''
            ' | sed -n \'s/.*"finished_at": \\([0-9.]*\\), "reward_mean":'
            ' \\([^,}]*\\).*/\\1:\\2/p; t; s/.*"finished_at": \\([0-9.]*\\).*/\\1/p\''
        )
        words = (
            f"{WITHIN} journalctl --no-pager --quiet --output=cat --lines={NUM_WORDS} --identifier"
        )

        return (
            f"{safe_read.FUNCTIONS}"
            # A deploy in progress has its new settings there too, with another suffix.
            f" for f in $(ls {CONFIGURATION} 2>/dev/null | grep '[.]yaml$'); do role=${{f%.yaml}};"
            " case $role in"
            f" worker-*) units=hivewright-worker@${{role#*-}}.service;; {_UNITS_OF_ROLES} *)"
            " continue;; esac;"
            f' for unit in $units; do echo unit=$unit; shown=$({show} $unit); echo "$shown";'
            " case $shown in *ActiveState=active*NRestarts=0*|*NRestarts=0*ActiveState=active*)"
            " ;; *)"
            f" {words}=${{unit%.service}} | LC_ALL=C tr -cd '\\12\\40-\\176' | sed 's/^/words=/';;"
            " esac;"
            f" at=$(TZ=UTC {WITHIN} systemctl show --property=ActiveEnterTimestamp --value $unit);"
            ' [ -z "$at" ] || echo started_at=$(date --date="$at" +%s);'
            f" case $unit in *contract*) continue;; esac; echo finished=$({finished});"
            f" file={STATE}/$role/{StateDir.status};"
            ' ! what=$(what_is $file) || { echo "what=$what";'
            # Not echo, because that of some shells interprets backslashes.
            f" printf status=; own_file $file | tr -d '\\n'; echo; }}; done; done; echo {END}"
        )

    def read(
        self,
        lines: list[str],
    ) -> list[dict[str, Any]]:
        blocks: list[dict[str, str]] = []
        for key, _, value in (line.partition("=") for line in lines):
            if key == "unit":
                blocks.append({})
            if blocks and key == "words":
                value = f"{blocks[-1].get('words', '')}{value}\n"
            if blocks:
                blocks[-1][key] = value
        return [asdict(_node_report(block)) for block in blocks]


def _node_report(block: Mapping[str, str]) -> NodeReport:
    unit = block["unit"]
    status, problem = _status(block) if "status" in block else (None, None)
    finished = list(_finished(block.get("finished", "")))
    return NodeReport(
        unit=unit,
        active_state=block.get("ActiveState") or "unknown",
        status=status,
        started_at=float(_number(block.get("started_at", "")) or 0),
        restarts=_number(block.get("NRestarts", "")) or 0,
        exit_status=_number(block.get("ExecMainStatus", "")) or 0,
        finished=tuple(one.at for one in finished),
        rewards=tuple(one.reward for one in finished),
        problem=problem,
        last_words=last_words(block.get("words", "").splitlines()),
        result=block.get("Result") or None,
    )


def _finished(text: str) -> Iterator[_Finished]:
    for word in text.split():
        at, _, reward = word.partition(":")
        # A line that was truncated when the machine died is not a round.
        if re.fullmatch(r"\d+(\.\d+)?", at):
            is_number = re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", reward)
            yield _Finished(float(at), float(reward) if is_number else None)


def last_words(lines: Sequence[str]) -> str | None:
    """Return the line of a log that best explains an end: the last error, or the last line."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if _ERROR.search(line) and not line.startswith("File ")]
    chosen = errors or said
    return chosen[-1][:_LONGEST_WORDS] if chosen else None


def _status(block: Mapping[str, str]) -> tuple[dict[str, Any] | None, str | None]:
    """Return the content of status.json, or the reason why it is unusable."""
    if wrong := safe_read.why_not_read(block["what"]):
        return None, f"status.json {wrong}"
    try:
        status = json.loads(block["status"])
        (_KeeperStatus if is_keeper(block["unit"]) else _WorkerStatus).model_validate(status)
    except (ValueError, RecursionError) as error:
        return None, f"status.json can't be read: {_reason(error)}"
    return status, None


def is_keeper(unit: str) -> bool:
    return unit == "hivewright-keeper.service"


def is_worker(unit: str) -> bool:
    return unit.startswith("hivewright-worker@")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
    return "nested too deep" if isinstance(error, RecursionError) else f"no JSON: {error}"


def _number(text: str) -> int | None:
    """Parse a number; None if the text is not one (systemd prints "[not set]" or nothing)."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: memory in MiB, `use` in percent, None where the card does not report the figure.

    `pids`: processes that compute on it.
    """

    index: int
    memory_used: int | None
    memory_total: int | None
    use: int | None
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HostState:
    """A host as a whole.

    `commit`: the current release, None on a bare host. `deployed`: digest of the host's
    configuration after its last deploy; None if no deploy was ever completed or the last one was
    cut off. `previous`: the release that `rollback` restores. Disk space in 10^6 bytes, of the
    state folder. `tailscale`: BackendState of its daemon, None without one; `tailscale_server`: its
    control server; `key_expires_at`: Unix time at which its key expires, None: never. `problem`:
    nvidia-smi's error; None without an error or without nvidia-smi. `ill`: problems of cards (from
    `nvidia-smi -q` and the kernel's log) and of memory, with what to do. `clock_offset`: seconds
    that its clock is ahead of ours, None: unknown.
    """

    commit: str | None = None
    deployed: str | None = None
    previous: str | None = None
    disk_free_mb: int | None = None
    disk_total_mb: int | None = None
    tailscale: str | None = None
    tailscale_server: str | None = None
    key_expires_at: float | None = None
    clock_offset: float | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None
    ill: tuple[str, ...] = ()


class HostStates(Answer[dict[str, Any]]):
    """The HostState of the host, as a dict."""

    def command(self) -> str:
        gpu = f"{WITHIN} nvidia-smi --format=csv,noheader,nounits"
        of_gpus = "--query-gpu=index,uuid,memory.used,memory.total,utilization.gpu"
        return (
            f"exec 2>/dev/null; {gpus.FIND_TOOLS} echo commit=$(basename $(readlink {CURRENT}));"
            f" echo deployed=$(cat {DEPLOYED}/{WHOLE}); echo previous=$(basename $(cat"
            f" {PREVIOUS}/current));"
            f" for d in {STATE} /; do [ ! -d $d ] || {{"
            f" echo disk=$({WITHIN} df --output=avail,size --block-size=1000000 $d | tail -n 1);"
            " break; }; done;"
            f" ! command -v tailscale >/dev/null || echo tailscale=$({WITHIN} tailscale status"
            " --json | tr -d '\n');"
            f" ! command -v tailscale >/dev/null || {WITHIN} tailscale debug prefs"
            ' | sed -n \'s/.*"ControlURL": *"\\(http[^"]*\\)".*/tailscale-server=\\1/p\';'
            # The GPUs' processes are queried only after an answer: a driver may hang each time.
            f" ! command -v nvidia-smi >/dev/null || {{ found=$({gpu} {of_gpus} 2>&1); code=$?;"
            ' printf "%s\\n" "$found" | sed "s/^/gpu=/"; echo nvidia-smi=$code; [ $code != 0 ] ||'
            f" {gpu} --query-compute-apps=gpu_uuid,pid | sed 's/^/process=/';"
            f" case $code in 0|15) {WITHIN} nvidia-smi -q | sed 's/^/health=/';; esac;"
            f" {WITHIN} journalctl --dmesg --quiet --no-pager --output=cat --grep=NVRM"
            " | tail -n 500 | sed 's/^/kernel=/'; };"
            " sed 's/^/meminfo=/' /proc/meminfo; sed 's/^/pressure=/' /proc/pressure/memory;"
            f" echo clock=$(date +%s); echo {END}"
        )

    def read(
        self,
        lines: list[str],
    ) -> dict[str, Any]:
        pairs = [line.partition("=")[::2] for line in lines]
        one = dict(pairs)
        disk = [_number(word) for word in one.get("disk", "").split()]
        free, total = disk if len(disk) == 2 else (None, None)
        pids: dict[str, list[int]] = {}
        for uuid, pid in re.findall(r"^process=(GPU-\S+), (\d+)$", "\n".join(lines), re.MULTILINE):
            pids.setdefault(uuid, []).append(int(pid))
        rows = [value for key, value in pairs if key == "gpu"]
        clock = _number(one.get("clock", ""))
        cards = [_gpu(row, pids) for row in rows]
        return asdict(
            HostState(
                commit=one.get("commit") or None,
                deployed=one.get("deployed") or None,
                previous=one.get("previous") or None,
                disk_free_mb=free,
                disk_total_mb=total,
                tailscale=_backend_state(one.get("tailscale")),
                tailscale_server=one.get("tailscale-server"),
                key_expires_at=tailscale_key.parse(one.get("tailscale", "")),
                clock_offset=None if clock is None else clock - time.time(),
                gpus=tuple(card for card in cards if card is not None),
                problem=_nvidia_problem(one.get("nvidia-smi", "0"), rows, cards),
                ill=(*_illnesses(pairs), *host_memory.problems(_memory(pairs))),
            )
        )


def _memory(pairs: Sequence[tuple[str, str]]) -> host_memory.HostMemory:
    files = (
        "\n".join(value for key, value in pairs if key == name) for name in ("meminfo", "pressure")
    )
    return host_memory.parse(*files)


def _illnesses(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each problem of a card; a lost one is in `problem` already."""
    health = "\n".join(value for key, value in pairs if key == "health")
    cards = [card for card in gpu_health.parse(health) if card.uuid is not None]
    names = {gpu_health.short_address(card.bus_id): card.name for card in cards}
    for card in cards:
        for problem in card.problems:
            yield f"GPU {gpu_health.short_address(card.bus_id)} ({card.name}): {problem}"
    kernel = gpu_health.xid_problems(value for key, value in pairs if key == "kernel")
    for address, problems in kernel.items():
        for problem in problems:
            yield f"GPU {address} ({names.get(address) or 'not listed'}): {problem}"


def _nvidia_problem(
    code: str,
    rows: Sequence[str],
    cards: Sequence[Gpu | None],
) -> str | None:
    """Return nvidia-smi's error output or exit code; None if there is no error."""
    said = " ".join(
        row.strip() for row, card in zip(rows, cards, strict=True) if card is None
    ).strip()
    if code in ("124", "137"):
        said = f"no answer within {WITHIN.split()[-1]} s"
    elif code != "0":
        said = said or f"ended with code {code}"
    return f"nvidia-smi: {said[:_LONGEST_PROBLEM]}" if said else None


def _backend_state(text: str | None) -> str | None:
    if text is None:
        return None
    if not text:
        return "no answer"
    try:
        return str(json.loads(text)["BackendState"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unreadable"


def _gpu(
    row: str,
    pids: Mapping[str, Sequence[int]],
) -> Gpu | None:
    """Return the GPU of a row of nvidia-smi's table; None if the row is an error message."""
    cells = row.split(", ")
    if len(cells) != 5 or not cells[0].isdecimal():
        return None
    index, uuid, *figures = cells
    # ERR!, [Unknown Error], [GPU requires reset]: the card does not work; these are not a 0.
    if not all(text in gpus.NO_FIGURE or _number(text) is not None for text in figures):
        return None
    used, total, use = map(_number, figures)
    return Gpu(int(index), used, total, use, tuple(pids.get(uuid, ())))


class Logs(Answer[list[str]]):
    """The last lines of a host's services, oldest first, as journalctl prints them."""

    def command(
        self,
        lines: int,
        unit: str,
    ) -> str:
        return (
            "journalctl --no-pager --quiet --output=short-iso --no-hostname"
            f" --lines={int(lines)} --unit={shlex.quote(unit)}; echo {END}"
        )

    def read(
        self,
        lines: list[str],
    ) -> list[str]:
        return lines


class MeshParts(Answer[dict[str, Any]]):
    """The host's MeshPart, as a dict."""

    def command(self) -> str:
        return f"{WireGuard().command()}; echo {END}"

    def read(
        self,
        lines: list[str],
    ) -> dict[str, Any]:
        return asdict(WireGuard().process(lines))


class Footprint(Answer[list[str]]):
    """The paths and units on a host that `hivewright fleet uninstall` would remove."""

    def command(self) -> str:
        return (
            f"ls -dq {ROOT} {CONFIGURATION} {STATE} {CACHE} {LOGS} {COMMAND}"
            f" {UNITS}/hivewright-*.service {mesh.CONFIGURATION} {mesh.KEY} {STATE}/*/swarm.pem"
            f" {STATE}/*/*.key {STATE}/*/ledger.db 2>/dev/null; echo {END}"
        )

    def read(
        self,
        lines: list[str],
    ) -> list[str]:
        return lines


class SealedToken(Answer[str]):
    """The host's enrolment token, sealed for the owner of `key`, in base64; empty if it has none.

    Uses `seal` of deploys/backup_pack.py, which earlier releases on a host call `sealing`.
    """

    def command(self, key: str) -> str:
        token = CONFIGURATION / "enrolment.token"
        program = (
            "import importlib, pathlib, sys;name = 'backup_pack' if"
            " pathlib.Path('deploys/backup_pack.py').exists() else 'sealing';seal ="
            " importlib.import_module('deploys.' +"
            " name).seal;sys.stdout.write(seal(pathlib.Path(sys.argv[2]).read_bytes(),"
            " sys.argv[1]))"
        )
        python = f"environment/bin/python -B -c {shlex.quote(program)} {shlex.quote(key)} {token}"
        return (
            f"if [ -d {CURRENT}/ ] && [ -e {token} ]; then cd {CURRENT} && {python}; fi && echo"
            f" {END}"
        )

    def read(self, lines: list[str]) -> str:
        return "".join(lines)

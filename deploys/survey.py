"""What the commands for whole fleets ask of a host: what it is doing, what it holds, what it says.

A host that could not answer to the end has no value (None): a worker that is not heard of is not one without worries.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from pyinfra.api import FactBase

from deploys import mesh
from deploys.facts import CACHE, COMMAND, CURRENT, DEPLOYED, LOGS, PREVIOUS, ROOT, WHOLE
from deploys.places import CONFIGURATION, STATE

# How many of a worker's last rounds are looked at.
NUM_ROUNDS = 8
# The last line of an answer that is whole.
END = "end"

T = TypeVar("T")


class Answer(FactBase[T | None], Generic[T]):
    """A fact that always has an answer, whose command ends with a line END. Without that it is None."""

    def process(self, output: list[str]) -> T | None:
        return self.read(output[:-1]) if output[-1] == END else None

    def read(self, lines: list[str]) -> T:
        """The answer, without its last line."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one service of a host is doing. `status`: the status.json of its state folder, None if it wrote none.

    `started_at`: when it was started last, by the host's clock in seconds since 1970, 0 if it does not run. `restarts`:
    by systemd, since somebody started it. `exit_status`: of its last end. `finished`: when its last rounds were
    finished, the newest last, at most NUM_ROUNDS; without those whose numbers were not finite.
    """

    unit: str
    active_state: str
    status: dict[str, Any] | None
    started_at: float = 0.0
    restarts: int = 0
    exit_status: int = 0
    finished: tuple[float, ...] = ()


class NodeReports(Answer[list[dict[str, Any]]]):
    """A NodeReport, as a dict, for each worker and keeper that is configured on the host."""

    def command(self) -> str:
        show = "TZ=UTC systemctl show --property=ActiveState,ActiveEnterTimestamp,NRestarts,ExecMainStatus"
        finished = (
            f'tail -n {NUM_ROUNDS} {STATE}/$role/rounds.jsonl 2>/dev/null | grep -v \'"skipped": "non-finite"\''
            " | grep -o '\"finished_at\": [0-9.]*' | cut -d ' ' -f 2"
        )
        return (
            # A deploy that is under way has its new settings there too, by another ending.
            f"for f in $(ls {CONFIGURATION} 2>/dev/null | grep '[.]yaml$'); do role=${{f%.yaml}}; case $role in"
            " worker-*) unit=hivewright-worker@${role#*-}.service;; keeper) unit=hivewright-keeper.service;;"
            f" *) continue;; esac; echo unit=$unit; {show} $unit;"
            " at=$(TZ=UTC systemctl show --property=ActiveEnterTimestamp --value $unit);"
            ' [ -z "$at" ] || echo started_at=$(date --date="$at" +%s);'
            f' echo finished=$({finished}); echo "status=$(cat {STATE}/$role/status.json 2>/dev/null)"; done;'
            f" echo {END}"
        )

    def read(self, lines: list[str]) -> list[dict[str, Any]]:
        blocks: list[dict[str, str]] = []
        for key, _, value in (line.partition("=") for line in lines):
            if key == "unit":
                blocks.append({})
            blocks[-1][key] = value
        return [
            asdict(
                NodeReport(
                    unit=block["unit"],
                    active_state=block.get("ActiveState", "unknown"),
                    status=json.loads(block["status"]) if block.get("status") else None,
                    started_at=float(block.get("started_at", 0)),
                    restarts=int(block.get("NRestarts") or 0),
                    exit_status=int(block.get("ExecMainStatus") or 0),
                    finished=tuple(map(float, block.get("finished", "").split())),
                )
            )
            for block in blocks
        ]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Memory in MiB, `use` in percent; `pids`: of the processes that compute on it."""

    index: int
    memory_used: int
    memory_total: int
    use: int
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HostState:
    """What a host has of hivewright, as a whole. `commit`: the release that is current, None on a bare host.

    `deployed`: digest of what the last deploy made of the host; None if none was ever finished, or one was begun and
    did not get to its end. `previous`: the release that `rollback` would go back to. Disk in 10^6 bytes, of the state
    folder. `tailscale`: BackendState of its daemon, None without one.
    """

    commit: str | None = None
    deployed: str | None = None
    previous: str | None = None
    disk_free_mb: int | None = None
    disk_total_mb: int | None = None
    tailscale: str | None = None
    gpus: tuple[Gpu, ...] = ()


class HostStates(Answer[dict[str, Any]]):
    """The HostState of the host, as a dict."""

    def command(self) -> str:
        gpu = "nvidia-smi --format=csv,noheader,nounits"
        return (
            f"exec 2>/dev/null; echo commit=$(basename $(readlink {CURRENT}));"
            f" echo deployed=$(cat {DEPLOYED}/{WHOLE}); echo previous=$(basename $(cat {PREVIOUS}/current));"
            f" for d in {STATE} /; do [ ! -d $d ] || {{"
            " echo disk=$(df --output=avail,size --block-size=1000000 $d | tail -n 1); break; }; done;"
            " ! command -v tailscale >/dev/null || echo tailscale=$(tailscale status --json | tr -d '\n');"
            f" ! command -v nvidia-smi >/dev/null || {{ {gpu}"
            " --query-gpu=index,uuid,memory.used,memory.total,utilization.gpu | sed 's/^/gpu=/';"
            f" {gpu} --query-compute-apps=gpu_uuid,pid | sed 's/^/process=/'; }}; echo {END}"
        )

    def read(self, lines: list[str]) -> dict[str, Any]:
        pairs = [line.partition("=")[::2] for line in lines]
        one = dict(pairs)
        free, total = map(int, one["disk"].split()) if one.get("disk") else (None, None)
        pids: dict[str, list[int]] = {}
        for uuid, pid in (value.split(", ") for key, value in pairs if key == "process"):
            pids.setdefault(uuid, []).append(int(pid))
        return asdict(
            HostState(
                commit=one.get("commit") or None,
                deployed=one.get("deployed") or None,
                previous=one.get("previous") or None,
                disk_free_mb=free,
                disk_total_mb=total,
                tailscale=_backend_state(one.get("tailscale")),
                gpus=tuple(_gpu(value, pids) for key, value in pairs if key == "gpu"),
            )
        )


def _backend_state(text: str | None) -> str | None:
    if text is None:
        return None
    return str(json.loads(text)["BackendState"]) if text else "no answer"


def _gpu(line: str, pids: Mapping[str, Sequence[int]]) -> Gpu:
    index, uuid, used, total, use = line.split(", ")
    return Gpu(int(index), _figure(used), _figure(total), _figure(use), tuple(pids.get(uuid, ())))


def _figure(text: str) -> int:
    """A number of nvidia-smi's, which says [N/A] where a card does not know."""
    return int(text) if text.isdecimal() else 0


class Logs(Answer[list[str]]):
    """The last lines of a host's services, oldest first, each with time, host and unit as journalctl has them."""

    def command(self, lines: int, unit: str) -> str:
        return (
            "journalctl --no-pager --quiet --output=short-iso --no-hostname"
            f" --lines={int(lines)} --unit={shlex.quote(unit)}; echo {END}"
        )

    def read(self, lines: list[str]) -> list[str]:
        return lines


class Footprint(Answer[list[str]]):
    """Everything of hivewright's on a host: the paths and units that `hivewright fleet uninstall` would remove."""

    def command(self) -> str:
        return (
            f"ls -d {ROOT} {CONFIGURATION} {STATE} {CACHE} {LOGS} {COMMAND} /etc/systemd/system/hivewright-*.service"
            f" {mesh.CONFIGURATION} {mesh.KEY}"
            f" {STATE}/*/swarm.pem {STATE}/*/*.key {STATE}/*/ledger.db 2>/dev/null; echo {END}"
        )

    def read(self, lines: list[str]) -> list[str]:
        return lines


class Sealed(Answer[str]):
    """The host's identities and ledgers as a tar, sealed for the holder of `key` (deploys/sealing.py), in base 64.

    Empty on a bare host.
    """

    def command(self, key: str) -> str:
        python = "environment/bin/python -B -m deploys.sealing"
        return f"if [ -d {CURRENT}/ ]; then cd {CURRENT} && {python} {shlex.quote(key)}; fi && echo {END}"

    def read(self, lines: list[str]) -> str:
        return "".join(lines)

"""Own facts: what a host already has of hivewright. Each is one command, and an empty answer means a bare host."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyinfra.api import FactBase

from deploys.places import CONFIGURATION, STATE

ROOT = Path("/opt/hivewright")
RELEASES = ROOT / "releases"
ENVIRONMENTS = ROOT / "environments"
ANVILS = ROOT / "anvil"
# What was shipped to a host without internet: files by their digest, and for each environment the wheels it is from.
SHIPPED = ROOT / "shipped"
WHEELS = ROOT / "wheels"
CURRENT = ROOT / "current"
DEPLOYED = STATE / "deployed"
# In DEPLOYED, beside the digests of services: that of the whole host, there when its deploy got to the end.
WHOLE = "host"
# What the host was before its last deploy: settings, units, digests, and which release was current.
PREVIOUS = ROOT / "previous"
CACHE = Path("/var/cache/hivewright")
LOGS = Path("/var/log/hivewright")
COMMAND = Path("/usr/local/bin/hivewright")
# How many of a worker's last rounds are looked at.
NUM_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class InstalledReleases:
    """What is complete on the host. `current`: the commit that it runs, None on a bare host.

    `parts`: for each commit, the one installed last first, the folders outside of the release that it uses
    (`environments/DIGEST`, `anvil/DIGEST`, `wheels/DIGEST`). `folders`: all such folders that exist.
    """

    current: str | None = None
    parts: dict[str, frozenset[Path]] = field(default_factory=dict)
    folders: frozenset[Path] = frozenset()

    def has(self, commit: str, kind: Path) -> bool:
        """Whether the release has its part among `kind` (ENVIRONMENTS, ANVILS)."""
        return any(part.parent == kind for part in self.parts.get(commit, ()))


class Releases(FactBase[InstalledReleases]):
    """The releases and environments that are complete on the host."""

    def command(self) -> str:
        return (
            "exec 2>/dev/null;"
            f" echo current $(basename $(readlink {CURRENT}));"
            f" for r in $(ls -t {RELEASES}); do cd {RELEASES}/$r;"
            " echo release $r $(readlink environment anvil wheels); done;"
            f" ls -d {ENVIRONMENTS}/* {ANVILS}/* {WHEELS}/* | sed 's/^/folder /'; true"
        )

    @staticmethod
    def default() -> InstalledReleases:
        return InstalledReleases()

    def process(self, output: list[str]) -> InstalledReleases:
        words = [line.split() for line in output]
        return InstalledReleases(
            current=next((w[1] for w in words if w[0] == "current" and len(w) > 1), None),
            parts={w[1]: frozenset(map(Path, w[2:])) for w in words if w[0] == "release"},
            folders=frozenset(Path(w[1]) for w in words if w[0] == "folder"),
        )


class Identities(FactBase[dict[int, str]]):
    """Peer id of every enrolled slot, by number of the slot."""

    def command(self) -> str:
        return f'for f in {STATE}/worker-*/enrolment.json; do [ ! -e "$f" ] || echo "$f $(tr -d "\\n" <"$f")"; done'

    @staticmethod
    def default() -> dict[int, str]:
        return {}

    def process(self, output: list[str]) -> dict[int, str]:
        found = {}
        for line in output:
            file, _, text = line.partition(" ")
            found[int(Path(file).parent.name.removeprefix("worker-"))] = str(json.loads(text)["peer_id"])
        return found


class ChosenModels(FactBase[list[int]]):
    """Numbers of the slots whose model was chosen by the machine (`model.name: auto`)."""

    def command(self) -> str:
        return f"ls {STATE}/worker-*/model.json 2>/dev/null || true"

    @staticmethod
    def default() -> list[int]:
        return []

    def process(self, output: list[str]) -> list[int]:
        return sorted(int(Path(line).parent.name.removeprefix("worker-")) for line in output)


class ConfiguredSlots(FactBase[list[int]]):
    """Numbers of the slots that have a settings file."""

    def command(self) -> str:
        return f"ls {CONFIGURATION} 2>/dev/null | sed -n 's/^worker-\\([0-9]*\\)\\.yaml$/\\1/p'"

    @staticmethod
    def default() -> list[int]:
        return []

    def process(self, output: list[str]) -> list[int]:
        return sorted(int(line) for line in output)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """`digest`: of all that the service was last started with by a deploy; None if it never was."""

    is_active: bool = False
    is_enabled: bool = False
    needs_reload: bool = False
    digest: str | None = None


class Service(FactBase[ServiceState]):
    """The state of one unit."""

    def command(self, unit: str) -> str:
        show = f"systemctl show --property=ActiveState,UnitFileState,NeedDaemonReload '{unit}'"
        return f"{{ {show}; echo Digest=$(cat '{DEPLOYED}/{unit}'); }} 2>/dev/null || true"

    @staticmethod
    def default() -> ServiceState:
        return ServiceState()

    def process(self, output: list[str]) -> ServiceState:
        properties: dict[str, Any] = dict(line.split("=", 1) for line in output if "=" in line)
        return ServiceState(
            is_active=properties.get("ActiveState") == "active",
            is_enabled=properties.get("UnitFileState") == "enabled",
            needs_reload=properties.get("NeedDaemonReload") == "yes",
            digest=properties.get("Digest") or None,
        )


@dataclass(frozen=True, slots=True)
class FileState:
    """A file without its content. `sha256`: of the content. `mode`: octal, such as 644."""

    sha256: str
    user: str
    group: str
    mode: str


class FileContent(FactBase[FileState | None]):
    """What stands at a path. None: nothing that is a file."""

    def command(self, path: str) -> str:
        return f"[ ! -f '{path}' ] || {{ sha256sum < '{path}'; stat --format='%U %G %a' '{path}'; }}"

    def process(self, output: list[str]) -> FileState | None:
        digest, attributes = output
        return FileState(digest.split()[0], *attributes.split())


class SystemdVersion(FactBase[int]):
    """systemd's version number; 0 where there is none."""

    def command(self) -> str:
        return "systemctl --version 2>/dev/null | head -n 1 || true"

    @staticmethod
    def default() -> int:
        return 0

    def process(self, output: list[str]) -> int:
        return int(output[0].split()[1])


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


class NodeReports(FactBase[list[dict[str, Any]]]):
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
            f' echo finished=$({finished}); echo "status=$(cat {STATE}/$role/status.json 2>/dev/null)"; done'
        )

    @staticmethod
    def default() -> list[dict[str, Any]]:
        return []

    def process(self, output: list[str]) -> list[dict[str, Any]]:
        blocks: list[dict[str, str]] = []
        for key, _, value in (line.partition("=") for line in output):
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


class HostStates(FactBase[dict[str, Any]]):
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
            f" {gpu} --query-compute-apps=gpu_uuid,pid | sed 's/^/process=/'; }}; true"
        )

    @staticmethod
    def default() -> dict[str, Any]:
        return asdict(HostState())

    def process(self, output: list[str]) -> dict[str, Any]:
        lines = [line.partition("=")[::2] for line in output]
        one = dict(lines)
        free, total = map(int, one["disk"].split()) if one.get("disk") else (None, None)
        pids: dict[str, list[int]] = {}
        for uuid, pid in (value.split(", ") for key, value in lines if key == "process"):
            pids.setdefault(uuid, []).append(int(pid))
        return asdict(
            HostState(
                commit=one.get("commit") or None,
                deployed=one.get("deployed") or None,
                previous=one.get("previous") or None,
                disk_free_mb=free,
                disk_total_mb=total,
                tailscale=_backend_state(one.get("tailscale")),
                gpus=tuple(_gpu(value, pids) for key, value in lines if key == "gpu"),
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


class Logs(FactBase[list[str]]):
    """The last lines of a host's services, oldest first, each with time, host and unit as journalctl has them."""

    def command(self, lines: int, unit: str) -> str:
        return (
            "journalctl --no-pager --quiet --output=short-iso --no-hostname"
            f" --lines={int(lines)} --unit={shlex.quote(unit)} || true"
        )

    @staticmethod
    def default() -> list[str]:
        return []

    def process(self, output: list[str]) -> list[str]:
        return output


class Footprint(FactBase[list[str]]):
    """Everything of hivewright's on a host: the paths and units that `hivewright fleet uninstall` would remove."""

    def command(self) -> str:
        return (
            f"ls -d {ROOT} {CONFIGURATION} {STATE} {CACHE} {LOGS} {COMMAND} /etc/systemd/system/hivewright-*.service"
            f" {STATE}/*/swarm.pem {STATE}/*/*.key {STATE}/*/ledger.db 2>/dev/null || true"
        )

    @staticmethod
    def default() -> list[str]:
        return []

    def process(self, output: list[str]) -> list[str]:
        return output


class Sealed(FactBase[str]):
    """The host's identities and ledgers as a tar, sealed for the holder of `key` (deploys/sealing.py), in base 64.

    Empty on a bare host.
    """

    def command(self, key: str) -> str:
        python = "environment/bin/python -B -m deploys.sealing"
        return f"[ ! -d {CURRENT}/ ] || {{ cd {CURRENT} && {python} {shlex.quote(key)}; }}"

    @staticmethod
    def default() -> str:
        return ""

    def process(self, output: list[str]) -> str:
        return "".join(output)

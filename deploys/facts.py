"""Facts about a host's deployment; each is one command, and empty output means a bare host."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pyinfra.api import FactBase
from pyinfra.api.exceptions import FactProcessError

from deploys import mesh, safe_read
from deploys.paths import (
    ANVILS,
    CONFIGURATION,
    CURRENT,
    DEPLOYED,
    ENVIRONMENTS,
    PREVIOUS,
    RELEASES,
    STATE,
    WHEELS,
    WHOLE,
)

# Length of an unparsable answer that is shown.
_LONGEST_SHOWN = 160

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InstalledReleases:
    """The complete releases of a host.

    `current`: the commit that it runs, None on a bare host. `parts`: for each commit, the most
    recently installed first, the shared folders that it uses (`environments/DIGEST`,
    `anvil/DIGEST`, `wheels/DIGEST`). `folders`: all such folders that exist.
    """

    current: str | None = None
    parts: dict[str, frozenset[Path]] = field(default_factory=dict)
    folders: frozenset[Path] = frozenset()

    def has(
        self,
        commit: str,
        kind: Path,
    ) -> bool:
        """Return whether the release has its part of this kind (ENVIRONMENTS, ANVILS)."""
        return any(part.parent == kind for part in self.parts.get(commit, ()))


class OwnFact(FactBase[T], Generic[T]):
    """Base of our facts: unparsable output fails the host that sent it, not the whole run."""

    def process(self, output: list[str]) -> T:
        try:
            return self.read(output)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = " ".join(output)[:_LONGEST_SHOWN]
            raise FactProcessError(
                f"{type(self).__name__}: got {said!r} ({type(error).__name__}: {error})"
            ) from None

    def read(self, output: list[str]) -> T:
        """Parse the output, which has at least one line."""
        raise NotImplementedError


class Releases(OwnFact[InstalledReleases]):
    """The releases and environments that are complete on the host."""

    def command(self) -> str:
        return (
            "exec 2>/dev/null;"
            f" echo current $(basename $(readlink {CURRENT}));"
            f" for r in $(ls -t {RELEASES}); do cd {RELEASES}/$r;"
            " echo release $r $(readlink environment anvil wheels); done;"
            f" ls -d {ENVIRONMENTS}/* {ANVILS}/* {WHEELS}/* | sed 's/^/folder /'; true"
        )

    default = staticmethod(InstalledReleases)

    def read(self, output: list[str]) -> InstalledReleases:
        current: str | None = None
        parts: dict[str, frozenset[Path]] = {}
        folders = set()
        for line in output:
            kind, *words = line.split()
            if kind == "current" and words:
                current = words[0]
            elif kind == "release":
                parts[words[0]] = frozenset(map(Path, words[1:]))
            elif kind == "folder":
                folders.add(Path(words[0]))
        return InstalledReleases(current, parts, frozenset(folders))


class Identities(OwnFact[dict[int, str]]):
    """The peer id of every enrolled slot, by slot number; damaged enrolments are left out."""

    def command(self) -> str:
        return (
            f"{safe_read.FUNCTIONS} for f in {STATE}/worker-*/enrolment.json; do"
            ' ! what_is "$f" >/dev/null || echo "$f $(own_file "$f" | tr -d "\\n")"; done'
        )

    default = staticmethod(dict[int, str])

    def read(
        self,
        output: list[str],
    ) -> dict[int, str]:
        found = {}
        for _, number, text in _enrolments(output):
            peer_id = _peer_id(text)
            if peer_id is not None:
                found[number] = peer_id
        return found


class DamagedEnrolments(OwnFact[list[str]]):
    """Enrolment files without a valid peer id; the command is that of Identities."""

    def command(self) -> str:
        return Identities().command()

    default = staticmethod(list[str])

    def read(
        self,
        output: list[str],
    ) -> list[str]:
        return [file for file, _, text in _enrolments(output) if _peer_id(text) is None]


def _enrolments(lines: list[str]) -> Iterator[tuple[str, int, str]]:
    """Yield file, slot number and content of each enrolment; skip other folders (worker-0.bak)."""
    for line in lines:
        if found := re.match(r"(.*/worker-(\d+)/enrolment\.json) (.*)", line):
            yield found[1], int(found[2]), found[3]


def _peer_id(text: str) -> str | None:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    peer_id = said.get("peer_id") if isinstance(said, dict) else None
    return peer_id if isinstance(peer_id, str) and peer_id else None


class MovedAway(OwnFact[dict[int, str]]):
    """Slots whose key a move has set aside and that have no new one.

    Maps the slot number to the peer id that the slot had, "" if unknown.
    """

    def command(self) -> str:
        return (
            f"{safe_read.FUNCTIONS} for d in {STATE}/worker-*; do"
            " [ ! -e $d/swarm.pem.moved ] || [ -e $d/swarm.pem ]"
            ' || echo "$d/enrolment.json $(own_file $d/enrolment.json.moved | tr -d "\\n")"; done'
        )

    default = staticmethod(dict[int, str])

    def read(
        self,
        output: list[str],
    ) -> dict[int, str]:
        return {number: _peer_id(text) or "" for _, number, text in _enrolments(output)}


class ChosenModels(OwnFact[list[int]]):
    """Numbers of the slots whose model was chosen by the machine (`model.name: auto`)."""

    def command(self) -> str:
        return f"ls {STATE}/worker-*/model.json 2>/dev/null || true"

    default = staticmethod(list[int])

    def read(
        self,
        output: list[str],
    ) -> list[int]:
        found = (re.fullmatch(r".*/worker-(\d+)/model\.json", line) for line in output)
        return sorted(int(match[1]) for match in found if match)


class ConfiguredSlots(OwnFact[list[int]]):
    """Numbers of the slots that have a settings file."""

    def command(self) -> str:
        return f"ls {CONFIGURATION} 2>/dev/null | sed -n 's/^worker-\\([0-9]*\\)\\.yaml$/\\1/p'"

    default = staticmethod(list[int])

    def read(
        self,
        output: list[str],
    ) -> list[int]:
        return sorted(int(line) for line in output)


class ConfiguredServices(OwnFact[list[str]]):
    """Roles of a coordinator that have a settings file."""

    def command(self) -> str:
        return (
            f"ls {CONFIGURATION} 2>/dev/null | sed -n '/^worker-/d; s/^\\([a-z]*\\)\\.yaml$/\\1/p'"
        )

    default = staticmethod(list[str])

    def read(
        self,
        output: list[str],
    ) -> list[str]:
        return sorted(output)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The state of a systemd service.

    `digest`: digest of everything that the last deploy started it with; None if none did.
    """

    is_active: bool = False
    is_enabled: bool = False
    needs_reload: bool = False
    digest: str | None = None


class Service(OwnFact[ServiceState]):
    """The state of one unit."""

    def command(self, unit: str) -> str:
        show = f"systemctl show --property=ActiveState,UnitFileState,NeedDaemonReload '{unit}'"
        return f"{{ {show}; echo Digest=$(cat '{DEPLOYED}/{unit}'); }} 2>/dev/null || true"

    default = staticmethod(ServiceState)

    def read(self, output: list[str]) -> ServiceState:
        pairs = (line.partition("=") for line in output)
        properties = {key: value for key, _, value in pairs}
        return ServiceState(
            is_active=properties.get("ActiveState") == "active",
            is_enabled=properties.get("UnitFileState") == "enabled",
            needs_reload=properties.get("NeedDaemonReload") == "yes",
            digest=properties.get("Digest") or None,
        )


@dataclass(frozen=True, slots=True)
class FileState:
    """A file's `sha256`, owner, and `mode` in octal, such as 644."""

    sha256: str
    user: str
    group: str
    mode: str


class FileContent(OwnFact[FileState | None]):
    """The file at a path; None if it does not exist."""

    def command(self, path: str) -> str:
        return (
            f"[ ! -f '{path}' ] || {{ sha256sum < '{path}' && stat --format='%U %G %a' '{path}'; }}"
        )

    def read(
        self,
        output: list[str],
    ) -> FileState | None:
        digest, attributes = output
        return FileState(digest.split()[0], *attributes.split())


class SystemdVersion(OwnFact[int]):
    """systemd's version number; 0 if systemd is missing."""

    def command(self) -> str:
        return "systemctl --version 2>/dev/null | head -n 1 || true"

    default = staticmethod(int)

    def read(self, output: list[str]) -> int:
        return int(output[0].split()[1])


@dataclass(frozen=True, slots=True)
class Deploys:
    """The last deploys of a host.

    `last`: digest of the host's whole configuration after its last deploy; None if no deploy was
    ever completed or the last one was cut off. `previous`: the release that `rollback` restores.
    """

    last: str | None = None
    previous: str | None = None


class PastDeploys(OwnFact[Deploys]):
    """The last two deploys of a host."""

    def command(self) -> str:
        previous = f"$(basename $(cat {PREVIOUS}/current))"
        return f"exec 2>/dev/null; echo last $(cat {DEPLOYED}/{WHOLE}); echo previous {previous}"

    default = staticmethod(Deploys)

    def read(self, output: list[str]) -> Deploys:
        found = dict(line.split() for line in output if " " in line)
        return Deploys(found.get("last"), found.get("previous"))


class UserEntry(OwnFact[tuple[str, str] | None]):
    """Home and shell of a user, None if there is no such user.

    pyinfra's own fact starts ten processes for each existing user.
    """

    def command(self, user: str) -> str:
        return f"getent passwd {user} || true"

    def read(
        self,
        output: list[str],
    ) -> tuple[str, str] | None:
        home, shell = output[0].split(":")[5:7]
        return home, shell


class InstalledPackages(OwnFact[frozenset[str]]):
    """Which of the given Debian packages are installed."""

    def command(self, names: Sequence[str]) -> str:
        show = "dpkg-query --show --showformat='${db:Status-Abbrev} ${Package}\\n'"
        return f"{show} {' '.join(names)} 2>/dev/null || true"

    default = staticmethod(frozenset[str])

    def read(
        self,
        output: list[str],
    ) -> frozenset[str]:
        installed = [line for line in output if line[1:2] == "i"]
        return frozenset(line.split()[-1] for line in installed)


@dataclass(frozen=True, slots=True)
class MeshPart:
    """A host's part of the WireGuard mesh.

    `public_key` and `digest` (of the configuration) are None if missing. `kernel`: whether the
    kernel supports WireGuard. `peers`: public keys of the host's peers, by name.
    """

    public_key: str | None = None
    digest: str | None = None
    runs: bool = False
    kernel: bool = False
    peers: dict[str, str] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        return self.public_key is not None or self.digest is not None or self.runs


# sed script for a configuration (deploys/mesh.py): prints each [Peer] as peer=NAME KEY.
_PEERS = r"/^\[Peer\]/ { n; s/^# //; h; n; s/^PublicKey = //; H; x; s/\n/ /; s/^/peer=/p }"


_WIREGUARD_KEY = re.compile(r"[A-Za-z0-9+/]{43}=")


class WireGuard(OwnFact[MeshPart]):
    """The host's part of the mesh; the private key is never read."""

    def command(self) -> str:
        key, own, unit = mesh.KEY, mesh.CONFIGURATION, mesh.UNIT
        return (
            f"exec 2>/dev/null; [ ! -e {key} ] || echo key=$(wg pubkey < {key}); [ ! -e {own} ] ||"
            f" echo digest=$(cat {own} {mesh.DROP_IN} | sha256sum | cut -c 1-64); [ ! -e {own} ] ||"
            f" sed -n '{_PEERS}' {own}; ! systemctl is-active --quiet {unit} || ! systemctl"
            f" is-enabled --quiet {unit} || echo runs=yes; ! {{ [ -e /sys/module/wireguard ] ||"
            " modprobe --dry-run --quiet wireguard; } || echo kernel=yes"
        )

    default = staticmethod(MeshPart)

    def read(self, output: list[str]) -> MeshPart:
        pairs = [line.split("=", 1) for line in output]
        said = dict(pairs)
        # A host's name may have spaces; a key has none.
        named = [value.rpartition(" ") for key, value in pairs if key == "peer"]
        peers = {name: key for name, _, key in named}
        key = said.get("key", "")
        # It is written to the configuration of every other host, so it must be valid.
        sound = key if _WIREGUARD_KEY.fullmatch(key) else None
        return MeshPart(sound, said.get("digest"), "runs" in said, "kernel" in said, peers)

"""Write systemd units and settings files, and restart services only when needed.

A service must restart if its unit, settings, secrets or release differ from those that it was
started with. A digest of these is stored on the host after the restart. So the next run completes
an interrupted one, and a run that finds the same digest does not touch the service.
"""

import base64
import hashlib
import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
from pyinfra import host
from pyinfra.api import StringCommand, operation

from deploys import host_files, mesh
from deploys.facts import FileContent, FileState, Service, SystemdVersion
from deploys.paths import CURRENT, DEPLOYED, ENROLMENT_TOKEN, UNITS, USER
from deploys.services import COORDINATOR_SERVICES, GPU_UNIT, unit_of
from worker import settings
from worker.settings import Settings

# Name of our drop-in of a unit.
DROP_IN = "hivewright.conf"
# The files below UNITS that a deploy has written, for `find .` there. There may be foreign drop-ins
# next to ours.
OURS = (
    "-maxdepth 2 -type f '(' -path './hivewright-*.service' -o -path"
    f" './hivewright-*.service.d/{DROP_IN}' ')'"
)
REMOVE_OURS = (
    f"(cd {UNITS} && find . {OURS} -delete && find . -maxdepth 1 -name 'hivewright-*.service.d'"
    " -empty -delete)"
)
TEMPLATES = Path(__file__).parents[1] / "templates"
# A stop takes at most 60 s and a start 300 s (templates/service.j2).
RESTART_SECONDS = 400
# Limit of open files: a peer-to-peer daemon and a server with many clients need some thousands.
OPEN_FILES = 65536
# Metadata services: Amazon, Azure, Google and most others; Amazon over IPv6 and for containers.
METADATA = "169.254.169.254 169.254.170.2 169.254.170.23 fd00:ec2::254 fd00:ec2::23"
HEADER = (
    "# Written by hivewright's deploy from the inventory; the next deploy overwrites what is"
    " changed here.\n"
)

_SERVICES = {service.unit: service for service in COORDINATOR_SERVICES}
_templates = jinja2.Environment(  # noqa: S701 - units are not HTML
    loader=jinja2.FileSystemLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def render(
    unit: str,
    systemd_version: int,
    watchdog_seconds: int,
) -> str:
    """Return the text of the unit file `unit`, for a host with that systemd."""
    template = _templates.select_template([f"{unit}.j2", "service.j2"])
    return template.render(
        service=_SERVICES.get(unit),
        units=_units,
        optional=_optional,
        user=USER,
        current=CURRENT,
        systemd_version=systemd_version,
        watchdog_seconds=watchdog_seconds,
        healthy_seconds=2 * watchdog_seconds,
        enrolment_token=ENROLMENT_TOKEN,
        open_files=OPEN_FILES,
        metadata=METADATA,
        # Addresses to listen on and to announce exist only when their networks are up.
        mesh=mesh.UNIT,
        gpu=GPU_UNIT,
    )


def _units(names: Iterable[str]) -> str:
    return "".join(f" {unit_of(name)}" for name in names)


def _optional(paths: Iterable[Path]) -> str:
    """Return paths for systemd that may be missing when the unit starts."""
    return " ".join(f"-{path}" for path in paths)


def settings_text(role_settings: Settings) -> str:
    return HEADER + settings.dump(role_settings)


class Written(NamedTuple):
    """A file that a service is started with.

    `is_new`: when this run began, the host did not have the file, or had a different one.
    """

    text: str
    is_new: bool


def install_unit(unit: str, watchdog_seconds: int) -> Written:
    """Write a unit file."""
    text = render(unit, host.get_fact(SystemdVersion), watchdog_seconds)
    written = host_files.file(name=f"Write {unit}", path=UNITS / unit, content=text.encode())
    return Written(text, written.will_change)


@operation()
def drop_in(
    unit: str,
    text: str,
    unused: Collection[Path] = (),
) -> Iterator[StringCommand]:
    """Write a drop-in file with `text`, or remove it if `text` is empty.

    `unused`: files that earlier drop-ins may have named and this one does not.
    """
    folder = UNITS / f"{unit}.d"
    file = folder / DROP_IN
    found = host.get_fact(FileContent, path=str(file))
    wanted = (
        FileState(hashlib.sha256(text.encode()).hexdigest(), "root", "root", "644")
        if text
        else None
    )
    if found == wanted:
        host.noop(f"{unit} has what it is to have")
        return
    if unused:
        yield StringCommand(f"rm -f {' '.join(map(str, unused))}")
    if text:
        script = f"umask 022 && mkdir -p {folder} && base64 -d > {file}.new && mv {file}.new {file}"
        yield StringCommand(script, _stdin=[base64.b64encode(text.encode()).decode()])
    else:
        yield StringCommand(remove_drop_in(unit))


def remove_drop_in(unit: str) -> str:
    """Return shell commands that remove our drop-in of a unit and keep those of others."""
    folder = UNITS / f"{unit}.d"
    return (
        f"rm -f {folder}/{DROP_IN} && {{ [ ! -d {folder} ] || rmdir --ignore-fail-on-non-empty"
        f" {folder}; }}"
    )


def install_settings(file: Path, role_settings: Settings) -> Written:
    """Write a settings file that root may change and the services may read."""
    text = settings_text(role_settings)
    written = host_files.file(
        name=f"Write {file.name}", path=file, content=text.encode(), group=USER, mode="640"
    )
    return Written(text, written.will_change)


def digest(*parts: str) -> str:
    """Return the digest of everything that a service is started with."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@operation()
def running(
    unit: str,
    digest: str,
    has_new_files: bool = False,
) -> Iterator[str]:
    """Enable `unit` and restart it unless it runs with `digest`; show its log if it does not start.

    `has_new_files`: one of its files had been changed, and the unit may have been restarted with
    the change, so it is restarted in any case.
    """
    state = host.get_fact(Service, unit=unit)
    name = shlex.quote(unit)
    if not state.is_enabled:
        yield f"systemctl enable --quiet {name}"
    if state.is_active and state.digest == digest and not (state.needs_reload or has_new_files):
        host.noop(f"{unit} runs")
        return
    yield "systemctl daemon-reload"
    # A unit that has failed too often may be started again, because something has changed.
    yield f"systemctl reset-failed {name} 2>/dev/null; true"
    # Whether or not it starts, the service no longer matches the old digest.
    yield f"rm -f {DEPLOYED}/{name}"
    last_words = f"journalctl --no-pager --quiet --output=cat --lines=15 --unit={name} >&2"
    yield f"systemctl restart {name} || {{ {last_words}; exit 1; }}"
    yield f"echo {digest} > {DEPLOYED}/{name}"

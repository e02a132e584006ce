"""The base of every host: packages, an unprivileged user, folders, and the command."""

from collections.abc import Iterator, Sequence

from pyinfra import host
from pyinfra.api import deploy, operation
from pyinfra.operations import files

from deploys import host_files
from deploys.facts import InstalledPackages, UserEntry
from deploys.hardware import CloudInitErrors, Distribution, System
from deploys.paths import (
    CACHE,
    COMMAND,
    CONFIGURATION,
    CURRENT,
    DEPLOYED,
    ENVIRONMENTS,
    LOGS,
    RELEASES,
    RETIRED,
    ROOT,
    STATE,
    USER,
)
from deploys.pyinfra_ext import run_report

# The guide's own list (see docs/operations/guide.md), then packages that the guide assumes.
PACKAGES = (
    "python3",
    "python3-venv",
    "python3-pip",
    "curl",
    "wget",
    "screen",
    "git",
    "lsof",
    "nano",
    "unzip",
    "iproute2",
    "build-essential",
    "gcc",
    "g++",
    "ca-certificates",
    "python3-dev",
)
# Releases whose own python3 is too old, and the one that they have next to it.
PYTHONS = {"jammy": "python3.11"}
COORDINATOR_PACKAGES: tuple[str, ...] = ()
# Owned by root: root would trust files there, so the services' user must not be able to rename any.
FOLDERS = (ROOT, RELEASES, ENVIRONMENTS, STATE, DEPLOYED, RETIRED, CACHE, LOGS)
NO_SHELL = "/usr/sbin/nologin"
INSTALL_SECONDS = 1800
APT = "DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes -o DPkg::Lock::Timeout=300"
# After an interruption (a power failure, a killed apt) dpkg refuses every installation until it is
# configured again. Unfinished work may also be another program's, for which the script waits.
FINISH_DPKG = (
    'n=0; while [ -n "$(ls -A /var/lib/dpkg/updates 2>/dev/null; dpkg --audit 2>&1)" ]; do !'
    " said=$(LC_ALL=C DEBIAN_FRONTEND=noninteractive dpkg --force-confdef --force-confold"
    ' --configure -a 2>&1 </dev/null) || break; case "$said" in *"locked by another process"*) ;;'
    ' *) echo "$said" >&2; echo "dpkg was interrupted before this deploy, and dpkg --configure -a'
    ' fails; fix that package there" >&2; exit 1;; esac; n=$((n + 1)); [ $n -lt 60 ] || { echo'
    ' "dpkg is still locked after 300 s: $said" >&2; exit 1; }; sleep 5; done;'
)
# A machine's first boot installs packages of its own.
AWAIT_CLOUD_INIT = (
    "if command -v cloud-init >/dev/null; then timeout 600 cloud-init status --wait >/dev/null"
    ' 2>&1; if [ $? = 124 ]; then echo "cloud-init is still at work after 600 s; see cloud-init'
    ' status --long there, and deploy again" >&2; exit 1; fi; fi;'
)
# DPkg::Lock::Timeout does not cover the lock of the package lists, which a new machine's first boot
# takes: apt-get update fails at once, with the name of the process that holds it.
APT_UPDATE = (
    f"{AWAIT_CLOUD_INIT} {FINISH_DPKG}"
    f" n=0; until said=$(LC_ALL=C {APT} update 2>&1); do"
    ' case "$said" in *"Could not get lock"*) ;; *) echo "$said" >&2; exit 1;; esac;'
    ' n=$((n + 1)); [ $n != 1 ] || echo "$said" | grep "lock" >&2;'
    ' [ $n -lt 60 ] || { echo "the lock is still taken after 300 s" >&2; exit 1; }; sleep 5; done'
)

WRAPPER = f"""\
#!/bin/sh
# Installed by hivewright's deploy: the command line of the current release. As root it becomes
# the services' user, so that it leaves no file of root's among theirs.
[ "$(id -u)" != 0 ] || exec runuser -u {USER} -- "$0" "$@"
# -P: ignore a folder called worker in the current folder.
PYTHONPATH=$(readlink -f {CURRENT}) exec {CURRENT}/environment/bin/python -P -m worker "$@"
"""


@deploy("System")
def prepare_system(is_coordinator: bool) -> None:
    """Install packages, user, folders and the `hivewright` command."""
    python = python_of(host.get_fact(Distribution))
    packages(
        name="Install packages",
        names=packages_on(python, is_coordinator),
        _timeout=INSTALL_SECONDS,
    )
    service_user(name="Make the hivewright user")
    for folder in host.loop(FOLDERS):
        files.directory(
            name=f"Make {folder}", path=str(folder), user="root", group="root", mode="755"
        )
    files.directory(
        name=f"Make {CONFIGURATION}", path=str(CONFIGURATION), user="root", group=USER, mode="750"
    )
    host_files.file(
        name="Install the hivewright command", path=COMMAND, content=WRAPPER.encode(), mode="755"
    )


def python_of(distribution: System) -> str:
    """Return the Python program with which the host's environments are made."""
    return PYTHONS.get(distribution.codename, "python3")


def packages_for(python: str) -> tuple[str, ...]:
    """Return the packages of a host with that Python."""
    return (
        PACKAGES if python == "python3" else (*PACKAGES, python, f"{python}-venv", f"{python}-dev")
    )


def packages_on(
    python: str,
    is_coordinator: bool,
) -> tuple[str, ...]:
    """Return the packages of a host with that Python, and of its kind."""
    return (*packages_for(python), *(COORDINATOR_PACKAGES if is_coordinator else ()))


@operation()
def service_user() -> Iterator[str]:
    """Create the user that runs all services."""
    found = host.get_fact(UserEntry, user=USER)
    if found == (str(STATE), NO_SHELL):
        host.noop(f"{USER} is there")
    elif found is None:
        group = f"$(! getent group {USER} >/dev/null || echo --gid {USER})"
        yield (
            f"useradd --system --no-create-home --home-dir {STATE} --shell {NO_SHELL} {group}"
            f" {USER}"
        )
    else:
        yield f"usermod --home {STATE} --shell {NO_SHELL} {USER}"


@operation()
def packages(names: Sequence[str]) -> Iterator[str]:
    """Install Debian packages; the package lists are fetched only if one is missing."""
    installed = host.get_fact(InstalledPackages, names=tuple(names))
    missing = [name for name in names if name not in installed]
    if not missing:
        host.noop("all packages are installed")
        return
    yield APT_UPDATE
    if errors := host.get_fact(CloudInitErrors):
        run_report.note(
            f"{host.name}: cloud-init, its first boot, failed: {errors}; `cloud-init status --long`"
            " says more"
        )
    yield f"{APT} install --no-install-recommends {' '.join(missing)}"

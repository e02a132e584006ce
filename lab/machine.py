"""Requirements of tests: root and Debian's container tools, installed if they are missing."""

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from lab.process import LabError, run

# Program that the lab runs -> Debian package that has it.
TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "apt-ftparchive": "apt-utils",
    "ip": "iproute2",
    "nft": "nftables",
    "ssh": "openssh-client",
    "git": "git",
}

INSTALLING = Path("/var/tmp/hivewright-tests-apt.lock")


def why_no_lab() -> str | None:
    """Return why the lab cannot run here, in one line, or None; installs missing packages."""
    if os.geteuid() != 0:
        return "the lab of test hosts needs root: run as root, or leave these tests out"
    return lacking("the lab of test hosts", TOOLS)


def lacking(
    who: str,
    tools: Mapping[str, str],
) -> str | None:
    """Return why programs are missing, in one line, or None; installs missing packages.

    `who` needs them; `tools`: Debian package by program.
    """
    missing = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    if not missing:
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{who} needs {', '.join(missing)}, which only root can install, with apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = (
        "--yes",
        "--quiet",
        "--no-install-recommends",
        "-o",
        "Dpkg::Options::=--force-unsafe-io",
    )
    try:
        # If several test processes run, the first one installs for all.
        with INSTALLING.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if any(shutil.which(tool) is None for tool in tools):
                run("apt-get", "update", "--quiet", timeout=120, env=environment)
                run("apt-get", "install", *options, *missing, timeout=300, env=environment)
    except LabError as error:
        return f"{who} needs {', '.join(missing)}: {str(error).splitlines()[0]}"
    return None

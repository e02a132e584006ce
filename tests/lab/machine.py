"""What this machine must have for the lab: root, and Debian's container tools. Installed where they are missing."""

import os
import shutil

from tests.lab.process import LabError, run

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


def why_no_lab() -> str | None:
    """None if the lab can run here, else the reason in one line. Installs missing packages where that is possible."""
    if os.geteuid() != 0:
        return "the lab of test hosts needs root: run as root, or leave these tests out"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if not missing:
        return None
    if shutil.which("apt-get") is None:
        return f"the lab of test hosts needs {', '.join(missing)}, and there is no apt-get here to install them"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing)
    try:
        run("apt-get", "update", "--quiet", timeout=120, env=environment)
        run(*install, timeout=300, env=environment)
    except LabError as error:
        return f"the lab of test hosts needs {', '.join(missing)}: {str(error).splitlines()[0]}"
    return None

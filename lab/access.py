"""The operator's access to the lab's hosts, for `inventory/lab.py`."""

from typing import Any

from pyinfra.api.exceptions import PyinfraError

from lab.lab import REPOSITORY_URL, Lab
from lab.lab_network import current_lab
from lab.process import LabError


def operator_access() -> dict[str, Any]:
    """Return the host data of the lab in whose network this process runs.

    Raises PyinfraError, which pyinfra prints as one line.
    """
    try:
        lab = Lab(current_lab())
    except LabError as error:
        raise PyinfraError(str(error)) from None
    return {
        "ssh_user": "root",
        "ssh_key": str(lab.folder / "id"),
        "ssh_known_hosts_file": str(lab.folder / "known_hosts"),
        "ssh_strict_host_key_checking": "yes",
        "release_repository": REPOSITORY_URL,
        "release_ref": "lab",
        # The hosts have no route to the internet: their environment is built on this machine, from
        # its own package sources.
        "torch_index": "pip",
        "secrets_dir": str(lab.folder / "secrets"),
    }

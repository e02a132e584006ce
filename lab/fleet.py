"""`make fleet`, `fleet-check`, `fleet-status`, `fleet-down`: three real hosts on this machine.

The hosts themselves are in the other modules of lab/. Needs the checkout.
"""

import sys
from collections.abc import Callable, Sequence

from deploys import progress
from deploys.fleet import pyinfra_process, status
from lab import machine
from lab.lab import Lab
from lab.process import LabError
from worker.errors import WorkerError

NUM_HOSTS = 3
INVENTORY = "inventory/lab.py"
DEPLOY_SECONDS = 1800.0


def up() -> int:
    """Boot the hosts, unless they run, and deploy the checkout with its uncommitted changes."""
    if reason := machine.why_no_lab():
        raise LabError(reason)
    lab = Lab("lab")
    if lab.is_up() and lab.is_current():
        print(f"{len(lab.hosts)} hosts are up; deploying the checkout as it is now", flush=True)
        lab.publish()
    else:
        print(
            "booting three hosts; the first time their parts are made, which takes some minutes",
            flush=True,
        )
        with progress.waiting(
            "making and booting the hosts; with an empty cache this takes about six minutes"
        ):
            lab.up(NUM_HOSTS)
    code = pyinfra_process.deploy(INVENTORY, prefix=lab.network.inside(), timeout=DEPLOY_SECONDS)
    if code == 0:
        print("the fleet trains; see `make fleet-status`, `make fleet-check`, `make fleet-down`")
    return code


def check() -> int:
    """Deploy again; return 1 if anything changed or failed."""
    results = pyinfra_process.deploy_json(
        INVENTORY, prefix=_running().network.inside(), timeout=DEPLOY_SECONDS
    )
    for operation in results["operations"]:
        for outcome, what in (("success", "changed"), ("error", "failed")):
            if operation[outcome]:
                print(f"{what} on {', '.join(operation[outcome])}: {operation['name']}")
    totals = results["totals"]
    num_changes = totals["success"] + totals["error"]
    print(
        f"{len(results['operations'])} operations on {NUM_HOSTS} hosts: {num_changes or 'no'}"
        " changes"
    )
    return 1 if num_changes or results["failed_hosts"] else 0


def show_status() -> int:
    return 0 if status.show(INVENTORY, prefix=_running().network.inside()) else 1


def down() -> int:
    """Remove the hosts, including remains of a crash."""
    Lab("lab").down()
    return 0


def _running() -> Lab:
    lab = Lab("lab")
    if not lab.is_up():
        raise LabError("the lab's hosts are not up; `make fleet` boots and deploys them")
    return lab


COMMANDS: dict[str, Callable[[], int]] = {
    "up": up,
    "check": check,
    "status": show_status,
    "down": down,
}


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1 or argv[0] not in COMMANDS:
        print(f"usage: python -m lab.fleet {'|'.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[argv[0]]()
    except (LabError, WorkerError) as error:
        print(f"fleet {argv[0]}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

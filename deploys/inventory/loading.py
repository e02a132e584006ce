"""Load and check the inventory before pyinfra connects to any host.

pyinfra runs deploy.py only after it has connected, treats the name of a missing file as an
inventory without hosts, and has no hook before connecting. But it runs config.py first, so the
inventory is loaded here too, in the same way as pyinfra loads it a moment later.
"""

import io
import os
import sys
import traceback
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host
from pyinfra.api.inventory import Inventory
from pyinfra_cli.exceptions import UnexpectedExternalError
from pyinfra_cli.inventory import make_inventory
from pyinfra_cli.util import exec_file, parse_cli_arg

from deploys.inventory import file_checks, planning
from deploys.pyinfra_ext import report_file, run_report
from worker.errors import SettingsError

DEPLOY = Path(__file__).parents[2] / "deploy.py"
SSH_OPTIONS = ("ssh_user", "ssh_key", "ssh_port", "ssh_password")


def check() -> None:
    """Make the plans of a run of deploy.py, or report all mistakes and exit; for config.py.

    A run that is given plans checks only how to connect to its hosts; the run that made the plans
    has checked everything else. For a run that only lists hosts the inventory is checked, and what
    a deploy would refuse is reported as a warning: every fleet command begins with such a run, and
    most work without a deploy.
    """
    options = click.get_current_context().params
    is_listing = "debug-inventory" in options["operations"][:1]
    is_deploy = any(Path(operation).resolve() == DEPLOY for operation in options["operations"])
    try:
        _check_file(options["inventory"], is_deploy)
        if is_deploy or is_listing:
            inventory = _load(options)
            _check_hosts(options, inventory)
            folder = os.environ.get(report_file.PLANS_VARIABLE)
            if folder and not is_listing:
                planning.take_over(
                    Path(folder), _limited(options, inventory), is_dry=options["dry"]
                )
                _mind_questions(options, len(inventory))
            elif is_deploy:
                planning.make(inventory, is_dry=options["dry"])
                if folder:
                    planning.hand_on(Path(folder))
                for line in planning.warnings():
                    run_report.warn(f"{file_checks.WARNING}{line}")
                _mind_questions(options, len(inventory))
            else:
                for line in planning.review(inventory):
                    run_report.warn(f"{file_checks.WOULD_REFUSE}{line}")
    except SettingsError as error:
        lines = str(error).splitlines()
        if len(lines) > 1:
            lines.insert(
                0, f"{options['inventory']}: {len(lines)} mistakes; nothing was done on any host"
            )
        run_report.refuse(lines)
        sys.exit(SettingsError.exit_code)


def _check_file(name: str, is_deploy: bool) -> None:
    """Raise SettingsError if `name` should be a file and is not; facts accept host names too."""
    is_path = name.endswith(".py") or ("/" in name and "@" not in name)
    if is_deploy or is_path or Path(name).exists():
        file_checks.whole_path(name)


def _load(options: Mapping[str, Any]) -> Inventory:
    override = {
        key: parse_cli_arg(value) for key, value in (pair.split("=", 1) for pair in options["data"])
    }
    override |= {key: options[key] for key in SSH_OPTIONS if options[key]}
    name = options["inventory"]
    try:
        if Path(name).is_file() and (
            lines := list(file_checks.forgotten(exec_file(name, return_locals=True)))
        ):
            raise SettingsError("\n".join(f"{name}: {line}" for line in lines))
        return make_inventory(name, override, str(Path.cwd()), options["group_data"])
    except SyntaxError as error:
        raise SettingsError(
            f"{error.filename} line {error.lineno}: {error.msg}; expected Python"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(
            f"{name}: is not UTF-8 text; expected Python, a copy of inventory/example.py"
        ) from None
    except PyinfraError as error:
        raise SettingsError(f"{name}: {error}") from None
    except UnexpectedExternalError as error:
        raise SettingsError(_where(error)) from None
    except click.ClickException as error:
        raise SettingsError(f"{name}: {error.format_message()}") from None


def _where(error: UnexpectedExternalError) -> str:
    """Return the line of the inventory, or of group data, whose own code failed, and the error."""
    cause = error.exception
    steps = [
        step
        for step in traceback.extract_tb(cause.__traceback__)
        if step.filename == error.filename
    ]
    line = f" line {steps[-1].lineno}" if steps else ""
    return f"{error.filename}{line}: {type(cause).__name__}: {cause}"


def _check_hosts(
    options: Mapping[str, Any],
    inventory: Inventory,
) -> None:
    """Raise SettingsError if there are no hosts, or none that a `--limit` matches."""
    name = options["inventory"]
    if not len(inventory):
        raise SettingsError(
            f"{name}: no hosts; expected lists of hosts, named coordinators and workers"
        )
    for pattern in options["limit"]:
        if pattern not in inventory.groups and not any(_fits(host, pattern) for host in inventory):
            raise SettingsError(f"{name}: --limit {pattern}: no such host or group")


def _limited(
    options: Mapping[str, Any],
    inventory: Inventory,
) -> list[Host]:
    """Return the hosts that the run is limited to."""
    limits = options["limit"]
    return [host for host in inventory if not limits or any(_fits(host, limit) for limit in limits)]


def _fits(host: Host, limit: str) -> bool:
    return fnmatch(host.name, limit) or limit in host.groups


def _mind_questions(
    options: Mapping[str, Any],
    num_hosts: int,
) -> None:
    """Answer or avoid pyinfra's questions if standard input is not a terminal.

    Otherwise an internal exception would end the run. Raises SettingsError if the changes must be
    confirmed.
    """
    if options["yes"] or options["json_output"] or sys.stdin.isatty():
        return
    if not options["dry"]:
        raise SettingsError(
            "no terminal to confirm the changes at; put -y before the inventory, or --dry to see"
            " them"
        )
    # pyinfra asks whether to continue without the failed hosts. They stay unchanged, so the answer
    # is yes.
    sys.stdin = io.StringIO("\n" * 2 * num_hosts)

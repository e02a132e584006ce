"""The command line: a table of commands, each a "module:function" imported when it is called.

This keeps `hivewright --help` fast, and a role imports only what it needs. Only this module turns
errors into exit codes and reads the environment (systemd's NOTIFY_SOCKET).
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from worker import __version__
from worker.commands import command_options
from worker.errors import ResourceError, SettingsError, WorkerError
from worker.runtime import entry_point

_MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""Errors of the machine, not of the program."""


@dataclass(frozen=True)
class Command:
    """A command. `target` is called with the settings and the parsed options.

    Commands without --settings are called with the options alone. `options` adds arguments to a
    parser: a function, or "module:function" if it is in another package.
    """

    name: str
    help: str
    target: str
    options: Callable[[argparse.ArgumentParser], None] | str | None = None
    takes_settings: bool = True
    is_service: bool = False


def _enrol_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--move",
        action="store_true",
        help=(
            "take the peer, with its rewards, from another account that has it (contracts of"
            " ours only)"
        ),
    )


def _login_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="address of the account service")
    _enrol_options(parser)


def _code_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("email", metavar="EMAIL", help="the address that was typed at the page")


def _invite_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes",
        type=command_options.positive,
        required=True,
        metavar="N",
        help="nodes that may use it",
    )
    parser.add_argument(
        "--until", required=True, metavar="DATE", help="last day on which it is valid: 2027-01-31"
    )


def _give_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address", metavar="ADDRESS", help="of an account without an e-mail address"
    )
    parser.add_argument("email", metavar="EMAIL", help="of its person")


def _output_options(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print JSON; rewards in thousandths, as on the chain"
    )
    form.add_argument(
        "--csv", action="store_true", help="print CSV; rewards in thousandths, as on the chain"
    )


def _status_options(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument(
        "--metrics", action="store_true", help="print the figures in Prometheus's text form"
    )


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="file to write (default: report.html)",
    )


def _audit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds",
        type=command_options.positive,
        metavar="N",
        help="newest rounds to look at (audit.rounds)",
    )
    parser.add_argument(
        "--sample",
        type=command_options.positive,
        metavar="N",
        help="rewards to draw at random (audit.sample)",
    )
    parser.add_argument(
        "--groups",
        type=Path,
        nargs="+",
        default=(),
        metavar="DIR",
        help="folders of signed groups (a node's groups/), instead of asking the peers",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for report and evidence (audit.state_dir)",
    )
    parser.add_argument("--json", action="store_true", help="print the report instead of a table")


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        help="only predict which engine this model would get, from its configuration",
    )


def _fetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with a Hugging Face token, for gated and private models (model.token_file)",
    )


def _fund_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="the account, 0x...")
    parser.add_argument("amount", metavar="AMOUNT", help="how much to add, in ether")


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE",
        help="write a .tar.gz for support too, without anything secret",
    )


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=command_options.positive,
        default=3,
        metavar="N",
        help="workers to start (default: 3)",
    )
    parser.add_argument(
        "--rounds",
        type=command_options.positive,
        default=10,
        metavar="N",
        help="rounds to train (default: 10)",
    )
    parser.add_argument(
        "--minutes",
        type=command_options.positive,
        metavar="N",
        help="begin no round when the workers have run for N minutes (default: no limit)",
    )
    parser.add_argument(
        "--seed",
        type=command_options.natural,
        default=0,
        metavar="N",
        help="seed of sampling and training (default: 0)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder for everything it writes (default: demo)",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="a real model in the place of the small one that comes with the package",
    )
    parser.add_argument(
        "--market",
        action="store_true",
        help="run a judge, too, on whose questions the workers bet",
    )


def _inventory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "form",
        choices=("tailscale", "csv", "ansible"),
        help="`tailscale status --json`, a CSV table, or an Ansible inventory",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the list; -: standard input")


_FLEET = "deploys.fleet.options:"
"""Fleet commands are in another package, which needs pyinfra and no torch."""

COMMANDS = (
    Command(
        "worker",
        "train in the swarm: answer, share, learn, earn",
        "worker.node:run",
        is_service=True,
    ),
    Command(
        "enrol",
        "make this node's key, once, and register it",
        "worker.enrolment:run",
        _enrol_options,
    ),
    Command(
        "bootnode", "a DHT peer with a stable address", "worker.swarm.bootnode:run", is_service=True
    ),
    Command(
        "chain up",
        "run the embedded chain (anvil)",
        "worker.chain.embedded.anvil:up",
        is_service=True,
    ),
    Command(
        "chain deploy",
        "deploy the coordinator contract, or upgrade it in place",
        "worker.chain.embedded.anvil:deploy",
    ),
    Command(
        "chain fund",
        "give an account money on the embedded chain",
        "worker.chain.embedded.fund:run",
        _fund_options,
    ),
    Command(
        "account",
        "the account service: signs and sends for nodes, and has the sign-in page",
        "worker.account.server:run",
        is_service=True,
    ),
    Command(
        "account code",
        "print a sign-in code for a person who waits at the sign-in page",
        "worker.commands.account_admin:code",
        _code_options,
    ),
    Command(
        "account invite",
        "make an invitation: a link for a person, a token for an inventory",
        "worker.commands.account_admin:invite",
        _invite_options,
    ),
    Command(
        "account give",
        "give the nodes of an invitation that nobody signed in with to a person",
        "worker.commands.account_admin:give",
        _give_options,
    ),
    Command(
        "login",
        "sign this node in to your account, with a code that you type in a browser",
        "worker.commands.login:run",
        _login_options,
    ),
    Command(
        "dashboard",
        "a web page about the swarm: rounds, peers, rewards",
        "worker.dashboard.server:run",
        is_service=True,
    ),
    Command(
        "judge",
        "run the prediction market's games, ask evaluation questions",
        "worker.judge.server:run",
        is_service=True,
    ),
    Command(
        "keeper",
        "advance the swarm's rounds, publish its bootnodes",
        "worker.chain.keeper:run",
        is_service=True,
    ),
    Command(
        "status", "what this node is doing", "worker.commands.reports:print_status", _status_options
    ),
    Command(
        "report",
        "one HTML file about this node's run: curves, before and after, examples",
        "worker.commands.training_report:run",
        _report_options,
    ),
    Command(
        "ledger",
        "what this node has earned, and which rewards are on the chain",
        "worker.commands.reports:print_ledger",
        _output_options,
    ),
    Command(
        "eval",
        "what this node's model earns on held-out tasks, before training and now",
        "worker.commands.evaluate:run",
        command_options.evaluation,
    ),
    Command(
        "export",
        "write the newest checkpoint as a model folder that transformers loads",
        "worker.commands.harvest:export",
        command_options.export,
    ),
    Command(
        "harvest offer",
        "evaluate the newest checkpoint and print it as a tar; `fleet harvest` runs this",
        "worker.commands.harvest:offer",
        command_options.held_out,
    ),
    Command(
        "harvest choose",
        "make a model of several nodes' weights; `fleet harvest` runs this",
        "worker.commands.harvest:choose",
        command_options.harvest_choose,
    ),
    Command(
        "answers",
        "what this node and its peers answered, best and worst next to each other",
        "worker.commands.show_answers:run",
        command_options.answers,
    ),
    Command(
        "chat",
        "talk to the newest checkpoint of this node",
        "worker.commands.chat:run",
        command_options.chat,
    ),
    Command(
        "audit",
        "recompute rewards that peers submitted from the groups that they signed",
        "worker.commands.audit:run",
        _audit_options,
    ),
    Command(
        "doctor",
        "check whether this machine can do what the settings ask",
        "worker.commands.doctor:run",
        _doctor_options,
    ),
    Command(
        "fetch",
        "download this node's model for all nodes of the machine",
        "worker.commands.fetch:run",
        _fetch_options,
    ),
    Command(
        "check",
        "check a settings file and print all that it resolves to",
        "worker.commands.reports:print_settings",
        _check_options,
    ),
    Command(
        "inventory",
        "make an inventory from a list of hosts that you have",
        "deploys.inventory.importers:run",
        _inventory_options,
        takes_settings=False,
    ),
    Command(
        "rollout",
        "deploy a fleet, one host first",
        "deploys.fleet.rollout_command:run",
        _FLEET + "rollout",
        takes_settings=False,
    ),
    *(
        Command(
            f"fleet {name}", help, f"deploys.fleet.{target}", _FLEET + options, takes_settings=False
        )
        for name, help, target, options in (
            ("status", "one table of what every host and worker is doing", "status:run", "status"),
            (
                "watch",
                "all hosts and slots, live, with curves of their rewards",
                "watch:run",
                "watch",
            ),
            ("logs", "the last lines of the services' logs", "commands:logs", "logs"),
            ("start", "start the services", "commands:start", "services"),
            (
                "stop",
                "stop the services, until a host boots or is deployed again",
                "commands:stop",
                "services",
            ),
            ("restart", "restart the services", "commands:restart", "services"),
            (
                "rollback",
                "bring hosts back to the state before their last deploy",
                "commands:rollback",
                "changes",
            ),
            (
                "backup",
                "save identities and ledgers in one encrypted file",
                "backup_command:run",
                "backup",
            ),
            (
                "restore",
                "restore identities and ledgers, to the same or other hosts",
                "restore_command:restore",
                "restore",
            ),
            (
                "fetch-token",
                "fetch the fleet's enrolment token to this machine",
                "tokens:fetch",
                "inventory",
            ),
            ("rotate-token", "give the fleet a new enrolment token", "tokens:rotate", "rotation"),
            (
                "harvest",
                "fetch the best model of the fleet, or the average of its nodes",
                "harvest_command:run",
                "harvest",
            ),
            (
                "take-back",
                "put keys back on hosts where a move has set them aside",
                "restore_command:take_back",
                "changes",
            ),
            ("uninstall", "remove hivewright from hosts", "commands:uninstall", "uninstall"),
        )
    ),
    Command(
        "demo",
        "a whole swarm on this machine: chain, keeper, workers",
        "worker.commands.demo:run",
        _demo_options,
        takes_settings=False,
    ),
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command, then exit with a code of worker.errors.

    On failure, the last line on standard error is the reason.
    """
    parsed = _parser().parse_args(argv)
    command: Command = parsed.command
    try:
        _call(command, parsed)
    except SettingsError as error:
        *others, last = error.mistakes or (str(error),)
        for mistake in others:
            _complain(mistake)
        if others:
            last += f"; correct this and {len(others)} more, a line each above"
        _exit(
            error.exit_code,
            f"hivewright {command.name}: SettingsError (exit {error.exit_code}): {last}",
        )
    except WorkerError as error:
        _exit(
            error.exit_code,
            f"hivewright {command.name}: {type(error).__name__} (exit {error.exit_code}): {error}",
        )
    except BrokenPipeError:
        # The program that reads our output has closed it (`hivewright ledger | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        reason = f"{error.strerror} at {error.filename}" if error.filename else error.strerror
        code = ResourceError.exit_code
        _exit(
            code,
            f"hivewright {command.name}: ResourceError (exit {code}): {reason}; make room or"
            " rights, then start again",
        )
    except KeyboardInterrupt:
        _exit(130, f"hivewright {command.name}: interrupted")
    sys.exit(0)


def _call(command: Command, parsed: argparse.Namespace) -> None:
    if not command.takes_settings:
        entry_point.load(command.target)(parsed)
        return
    from worker import log, settings

    if parsed.settings is None and command.name == "account":
        raise SettingsError("account: got no --settings FILE; expected the service's settings")
    if parsed.settings is None and parsed.model is None:
        raise SettingsError(
            "check: got neither --settings FILE nor --model NAME_OR_FOLDER; expected one of them"
        )
    loaded = settings.Settings() if parsed.settings is None else settings.load(parsed.settings)
    log.hide_passwords(settings.dump(loaded))
    if command.is_service:
        log.setup(loaded.log.level, loaded.log.format, parsed.log_file)
        from worker.runtime import systemd

        systemd.connect(os.environ.get("NOTIFY_SOCKET"))
        role = entry_point.load(command.target)
        if loaded.metrics.port is None:
            role(loaded)
            return
        from worker import metrics_endpoint  # prometheus_client takes a while to import

        with metrics_endpoint.serving(command.name, loaded):
            role(loaded)
    else:
        log.setup("WARNING", loaded.log.format)
        entry_point.load(command.target)(loaded, *([parsed] if command.options else []))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hivewright",
        description=(
            "Train language models together: run a node, or host the swarm. Start with `hivewright"
            " demo`."
        ),
    )
    parser.add_argument("--version", action="version", version=f"hivewright {__version__}")
    top = parser.add_subparsers(metavar="COMMAND", required=True)
    folders: dict[str, Any] = {"": top}
    named = {each.name for each in COMMANDS}
    # A command with subcommands: argparse would require --settings twice.
    parents = {each.name.rpartition(" ")[0] for each in COMMANDS} & named
    for command in COMMANDS:
        folder, _, name = command.name.rpartition(" ")
        if folder not in folders:
            group = top.add_parser(
                folder, help=f"commands about the {folder}: `hivewright {folder} --help`"
            )
            folders[folder] = group.add_subparsers(metavar="COMMAND", required=True)
        sub = folders[folder].add_parser(
            name, help=command.help, description=command.help[0].upper() + command.help[1:] + "."
        )
        if command.takes_settings:
            # `check --model` works without a node.
            needed = command.name != "check" and command.name not in parents
            sub.add_argument(
                "--settings",
                type=Path,
                required=needed,
                metavar="FILE",
                help="settings file (YAML)",
            )
        if command.is_service:
            sub.add_argument(
                "--log-file", type=Path, metavar="FILE", help="log to this file too; it is rotated"
            )
        if command.name in parents:
            folders[command.name] = sub.add_subparsers(metavar="COMMAND")
        if command.options:
            options = command.options
            add_options = entry_point.load(options) if isinstance(options, str) else options
            add_options(sub)
        sub.set_defaults(command=command)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        _exit(
            SettingsError.exit_code,
            f"{self.prog}: {message}; `{self.prog} --help` lists commands and options",
        )


def _exit(code: int, line: str) -> NoReturn:
    _complain(line)
    sys.exit(code)


def _complain(line: str) -> None:
    from worker.log import discreet, printable

    print(printable(discreet(line)), file=sys.stderr, flush=True)

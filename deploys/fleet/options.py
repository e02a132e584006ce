"""Options of the fleet commands. Loaded with the command line, so it imports nothing heavy."""

import argparse
from pathlib import Path

from worker.runtime.whole_numbers import whole_number


def rollout(parser: argparse.ArgumentParser) -> None:
    _inventory(parser)
    parser.add_argument(
        "--batch",
        default="25%",
        metavar="N|P%",
        help="hosts at a time after the first one, or a share (default: 25%%)",
    )
    parser.add_argument(
        "--gate-rounds",
        type=whole_number(1, 8),
        default=1,
        metavar="N",
        help="rounds that each worker of a batch must finish before the next batch (default: 1,"
        " at most 8)",
    )
    parser.add_argument(
        "--gate-seconds",
        type=whole_number(1),
        default=1800,
        metavar="S",
        help="how long they may take (default: 1800)",
    )
    parser.add_argument(
        "--gate-reward",
        type=_share,
        default=0.25,
        metavar="SHARE",
        help="share of its earlier mean reward that a worker must reach again; 0: any"
        " (default: 0.25)",
    )
    parser.add_argument(
        "--no-gate-credits",
        action="store_true",
        help="do not wait until the chain has confirmed a reward of each worker",
    )
    parser.add_argument(
        "--deadline",
        type=whole_number(1),
        default=3600,
        metavar="S",
        help="how long one host's deploy may take (default: 3600)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue with the hosts that the last rollout left behind",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of report and logs (default: rollouts/NAME of the inventory)",
    )
    _break_lock(parser)


def hosts(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command for some hosts of an inventory."""
    _inventory(parser)
    parser.add_argument(
        "--limit",
        action="append",
        metavar="HOST",
        help="only this host, pattern or group; may be given again",
    )


def changes(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that changes hosts."""
    hosts(parser)
    _break_lock(parser)


def services(parser: argparse.ArgumentParser) -> None:
    changes(parser)
    _unit(parser)


def status(parser: argparse.ArgumentParser) -> None:
    hosts(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def watch(parser: argparse.ArgumentParser) -> None:
    hosts(parser)
    parser.add_argument(
        "--every",
        type=whole_number(1, 3600),
        default=10,
        metavar="S",
        help="seconds between two looks (default: 10)",
    )
    parser.add_argument(
        "--times", type=whole_number(1), metavar="N", help="stop after N looks (default: never)"
    )


def logs(parser: argparse.ArgumentParser) -> None:
    hosts(parser)
    parser.add_argument(
        "--follow", action="store_true", help="continue with new lines until Ctrl-C"
    )
    parser.add_argument(
        "--lines",
        type=whole_number(1, 10000),
        default=50,
        metavar="N",
        help="lines a host (default: 50)",
    )
    _unit(parser)


def inventory(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command for the whole fleet."""
    _inventory(parser)


def rotation(parser: argparse.ArgumentParser) -> None:
    _inventory(parser)
    _break_lock(parser)


def uninstall(parser: argparse.ArgumentParser) -> None:
    changes(parser)
    parser.add_argument(
        "--identities", action="store_true", help="remove keys, ledgers and the chain's state too"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def backup(parser: argparse.ArgumentParser) -> None:
    hosts(parser)
    _archive(parser)


def restore(parser: argparse.ArgumentParser) -> None:
    _inventory(parser)
    _archive(parser)
    parser.add_argument("--to", required=True, metavar="HOST", help="host that gets them")
    parser.add_argument(
        "--from", dest="source", metavar="HOST", help="host that had them (default: the same)"
    )
    _break_lock(parser)


def harvest(parser: argparse.ArgumentParser) -> None:
    hosts(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="the new folder of the model (default: harvest-NAME of the inventory)",
    )
    parser.add_argument(
        "--tasks",
        type=whole_number(1, 10000),
        default=32,
        metavar="N",
        help="held-out tasks of each family and level (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="which held-out tasks (default: 0)",
    )
    parser.add_argument(
        "--seconds",
        type=whole_number(1, 86400),
        default=600,
        metavar="S",
        help="stop asking a model after this long (default: 600)",
    )
    parser.add_argument(
        "--no-average",
        dest="average",
        action="store_false",
        help="do not try the average of the workers' weights, which sends all of them to one host",
    )


def _break_lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--break-lock",
        action="store_true",
        help="change hosts even if another run seems to be changing them",
    )


def _unit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unit",
        default="*",
        metavar="NAME",
        help="one service, such as worker@0 or keeper (default: all)",
    )


def _inventory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inventory", metavar="INVENTORY", help="inventory file, as for pyinfra")


def _archive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archive", type=Path, required=True, metavar="FILE", help="the backup, encrypted"
    )
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help="its passphrase (default: asked for at the terminal)",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a share from 0 to 1")
    return share

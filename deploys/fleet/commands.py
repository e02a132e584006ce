"""`hivewright fleet ...`: maintenance between rollouts, on all hosts at the same time."""

import argparse
import base64
import difflib
import getpass
import io
import json
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox

from deploys import progress
from deploys.fleet import backup_file, queries
from deploys.fleet.pyinfra_process import Answers, Pyinfra, Ran, heed_signals
from deploys.paths import STATE
from worker.errors import SettingsError, WorkerError
from worker.log import printable
from worker.runtime.files import LINE, read_secret

ASK_SECONDS = 120.0
# A worker's stop takes at most a minute, its start five (templates/service.j2).
SERVICE_SECONDS = 600
NUM_PARALLEL = 16


def stop(options: argparse.Namespace) -> None:
    """Stop services; they stay stopped until the host boots, or the next start or deploy."""
    _at_services(options, "stop")


def start(options: argparse.Namespace) -> None:
    _at_services(options, "start")


def restart(options: argparse.Namespace) -> None:
    _at_services(options, "restart")


def _at_services(options: argparse.Namespace, action: str) -> None:
    _at_all(
        options,
        "deploys.maintenance.services",
        f"action={action}",
        f"unit={json.dumps(options.unit)}",
    )


def rollback(options: argparse.Namespace) -> None:
    """Restore the state of hosts before their last deploy: release, settings, units."""
    _at_all(options, "deploys.rollback.go_back")


def logs(options: argparse.Namespace) -> None:
    """Print the last lines of the services' logs, each with its host."""
    pyinfra = _pyinfra(options)
    names = chosen(pyinfra, options.limit)
    fact = (
        "deploys.fleet_facts.Logs",
        f"lines={options.lines}",
        f"unit=hivewright-{options.unit}.service",
    )
    with progress.waiting(f"asking {len(names)} host{'s' * (len(names) > 1)}"):
        answers = queries.ask(pyinfra, fact, names, queries.FACT_SECONDS)
    (found,) = answers.values
    for name in names:
        for line in found.get(name, ()):
            print(f"{name} {line}")
    if not any(found.values()) and not answers.reasons:
        _refuse_unknown_unit(pyinfra, names, options.unit)
    _complain(answers)


def _refuse_unknown_unit(
    pyinfra: Pyinfra,
    names: Sequence[str],
    unit: str,
) -> None:
    """Raise SettingsError if no host has such a service, whose log would just look empty."""
    (reports,) = queries.ask(
        pyinfra, ["deploys.fleet_facts.NodeReports"], names, queries.FACT_SECONDS
    ).values
    units = {report["unit"] for found in reports.values() for report in found}
    known = sorted(each.removeprefix("hivewright-").removesuffix(".service") for each in units)
    if not any(fnmatch(each, unit) for each in known):
        close = difflib.get_close_matches(unit, known, n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"these hosts have {', '.join(known) or 'none'}"
        )
        raise SettingsError(f"--unit {unit}: no such service on {', '.join(names)}; {hint}")


def uninstall(options: argparse.Namespace) -> None:
    """Print what would be removed, ask for confirmation, and remove it."""
    pyinfra = _pyinfra(options)
    names = chosen(pyinfra, options.limit)
    answers = queries.ask(pyinfra, ["deploys.fleet_facts.Footprint"], names, queries.FACT_SECONDS)
    (found,) = answers.values
    there = [name for name in names if name in found]
    for name in there:
        for path in found[name]:
            stays = not options.identities and Path(path).is_relative_to(STATE)
            print(f"{name}: {'(stays) ' if stays else ''}{path}")
        if not found[name]:
            print(f"{name}: nothing")
    if options.identities:
        print(
            "identities, ledgers and the chain's state go too: nothing brings them back but a"
            " backup"
        )
    else:
        print(
            f"of {STATE} stays what can't be made again: identities, tokens, ledgers, the"
            " coordinator's folders"
        )
    if not options.yes:
        if not sys.stdin.isatty():
            raise SettingsError("no terminal to confirm it at; put --yes to do it")
        if input(f"remove this from {len(there)} hosts? [yes/no] ") != "yes":
            raise SettingsError("not confirmed; nothing was removed")
    run_on_all(pyinfra, there, "deploys.maintenance.uninstall", _flag(options.identities))
    _complain(answers)


def restore(options: argparse.Namespace) -> None:
    """Restore a host's identities and ledgers from a backup, or move them to another host."""
    pyinfra = _pyinfra(options)
    known = [host["name"] for host in pyinfra.hosts(timeout=ASK_SECONDS)]
    target, source = options.to, options.source or options.to
    if target not in known:
        raise SettingsError(f"--to {target}: no such host in {pyinfra.inventory}")
    tars = backup_file.read(
        options.archive, passphrase(options.passphrase_file, is_new=False), source
    )
    if source not in tars:
        raise SettingsError(
            f"--from {source}: not in {options.archive}; it has {', '.join(sorted(tars))}"
        )
    _ask_target(pyinfra, target, tars[source])
    has_given_up = source != target and _retire(pyinfra, source, known)
    ran = _operate(pyinfra, target, "restore", ASK_SECONDS, _in_base64(tars[source]))
    if ran.outcome != "done":
        then = "nothing was restored there"
        if has_given_up:
            then += f"; {_undo(pyinfra, source)}"
        raise WorkerError(f"{target}: {ran.reason}; {then}")
    print(f"{target}: has the identities and ledgers of {source}; deploy it now")


def take_back(options: argparse.Namespace) -> None:
    """Give hosts back the keys that a move has set aside, unless another host has them now."""
    pyinfra = _pyinfra(options)
    everybody = [host["name"] for host in pyinfra.hosts(timeout=ASK_SECONDS)]
    names = chosen(pyinfra, options.limit)
    answers = queries.ask(
        pyinfra,
        ["deploys.facts.Identities", "deploys.facts.MovedAway"],
        everybody,
        queries.FACT_SECONDS,
    )
    identities, moved = answers.values
    givers = [name for name in names if moved.get(name)]
    if not givers:
        raise SettingsError(f"no move has set keys aside on {', '.join(names)}; nothing was done")
    _complain(answers, "; nothing was done: whether one of them has the identity now is not known")
    owners = {peer_id: name for name, found in identities.items() for peer_id in found.values()}
    for name in givers:
        for number, peer_id in moved[name].items():
            if owner := owners.get(peer_id):
                raise SettingsError(
                    f"{name}: slot {number}: its identity {peer_id} is on {owner} now, and two"
                    " workers can't be one node; move it back: `hivewright fleet backup`, then"
                    f" `fleet restore --from {owner} --to {name}`"
                )
    run_on_all(pyinfra, givers, "deploys.maintenance.take_back")


def _ask_target(pyinfra: Pyinfra, target: str, tar: bytes) -> None:
    """Raise WorkerError if the target would refuse the content, before anything is changed."""
    ran = _operate(
        pyinfra, target, "restore", ASK_SECONDS, _in_base64(_keys_only(tar)), "is_question=true"
    )
    if ran.outcome != "done":
        raise WorkerError(f"{target}: {ran.reason}; nothing was done on any host")


def _keys_only(tar: bytes) -> bytes:
    """Return a tar with only the slots' keys, by which the target decides whether it takes them."""
    stream = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(tar)) as whole,
        tarfile.open(fileobj=stream, mode="w") as keys,
    ):
        for member in whole:
            if re.fullmatch(r"worker-\d+/swarm\.pem", member.name):
                keys.addfile(member, whole.extractfile(member))
    return stream.getvalue()


def _retire(
    pyinfra: Pyinfra,
    source: str,
    known: Sequence[str],
) -> bool:
    """Make the old host give up its identities, so that no two hosts have them.

    Returns False if the host cannot be reached or is not in the inventory.
    """
    ran = Ran("unreachable", "not in the inventory")
    if source in known:
        ran = _operate(pyinfra, source, "retire", SERVICE_SECONDS)
    if ran.outcome == "done":
        print(
            f"{source}: stopped, its keys set aside; take its slots out of the inventory, a deploy"
            " refuses them",
            flush=True,
        )
        return True
    if ran.outcome != "unreachable":
        undone = _undo(pyinfra, source)
        raise WorkerError(f"{source}: {ran.reason}; nothing was moved; {undone}")
    print(
        f"{source}: {ran.reason}; if it comes back, it must not run with the identities that have"
        " moved",
        flush=True,
    )
    return False


def _undo(pyinfra: Pyinfra, source: str) -> str:
    """Restore the old host after a move that failed; return a description of the result."""
    ran = _operate(pyinfra, source, "take_back", SERVICE_SECONDS)
    if ran.outcome == "done":
        return f"{source} has its keys again, and runs as before"
    return (
        f"{source} could not be given its keys back ({ran.reason}): "
        f"`hivewright fleet take-back {pyinfra.inventory} --limit {source}` tries again"
    )


def _operate(
    pyinfra: Pyinfra,
    host: str,
    name: str,
    timeout: float,
    stdin: str | None = None,
    *arguments: str,
) -> Ran:
    """Run an operation of deploys/maintenance.py on one host, with a temporary log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        return pyinfra.operation(
            host, f"deploys.maintenance.{name}", log, *arguments, timeout=timeout, stdin=stdin
        )


def _in_base64(tar: bytes) -> str:
    return base64.b64encode(tar).decode()


def _report_waiting(futures: Mapping[str, Future[Ran]]) -> None:
    """Print the hosts that are not done to standard error, now and then, until all are done."""
    began, pause, waiting = time.monotonic(), progress.FIRST_SECONDS, set(futures.values())
    while waiting:
        _, waiting = wait(waiting, timeout=pause)
        pause = progress.EVERY_SECONDS
        if names := [name for name, future in futures.items() if not future.done()]:
            print(
                f"waiting for {', '.join(names)} ({time.monotonic() - began:.0f} s)",
                file=sys.stderr,
                flush=True,
            )


def _pyinfra(options: argparse.Namespace) -> Pyinfra:
    pyinfra = Pyinfra.of_operator(options.inventory)
    pyinfra.breaks_locks = bool(getattr(options, "break_lock", False))
    return pyinfra


def _at_all(
    options: argparse.Namespace,
    operation: str,
    *arguments: str,
) -> None:
    pyinfra = _pyinfra(options)
    run_on_all(pyinfra, chosen(pyinfra, options.limit), operation, *arguments)


def run_on_all(
    pyinfra: Pyinfra,
    names: Sequence[str],
    operation: str,
    *arguments: str,
    stdin: str | None = None,
) -> None:
    """Run one operation on many hosts. Raises WorkerError if it did not succeed on all."""
    heed_signals()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_PARALLEL) as pool:

        def run(name: str) -> Ran:
            log = Path(folder) / str(names.index(name))
            ran = pyinfra.operation(
                name, operation, log, *arguments, timeout=SERVICE_SECONDS, stdin=stdin
            )
            print(f"{name}: {ran.outcome}{f', {ran.reason}' if ran.reason else ''}", flush=True)
            return ran

        futures = {name: pool.submit(run, name) for name in names}
        try:
            _report_waiting(futures)
            failed = [name for name, future in futures.items() if future.result().outcome != "done"]
        except BaseException:
            pyinfra.stop()
            raise
    if failed:
        raise WorkerError(f"not done on {', '.join(failed)}; see above")


def chosen(pyinfra: Pyinfra, limits: Sequence[str] | None) -> list[str]:
    """Return the names of the hosts that `--limit` selects. Raises SettingsError if none match."""
    return [host["name"] for host in chosen_hosts(pyinfra, limits)]


def chosen_hosts(pyinfra: Pyinfra, limits: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the hosts that `--limit` (a name, a pattern or a group) selects.

    Raises SettingsError if a limit matches no host.
    """
    hosts = pyinfra.hosts(timeout=ASK_SECONDS)
    for limit in limits or ():
        if not any(_fits(host, limit) for host in hosts):
            raise SettingsError(f"--limit {limit}: no such host or group in {pyinfra.inventory}")
    return [host for host in hosts if not limits or any(_fits(host, limit) for limit in limits)]


def _fits(host: Mapping[str, Any], limit: str) -> bool:
    return fnmatch(host["name"], limit) or limit in host["groups"]


def _complain(answers: Answers, then: str = "; the others are done") -> None:
    if answers.reasons:
        silent = ", ".join(
            f"{name} ({printable(reason)})" for name, reason in answers.reasons.items()
        )
        raise WorkerError(f"no answer from {silent}{then}")


def opened(name: str, sealed: str, key: PrivateKey) -> bytes:
    try:
        return bytes(SealedBox(key).decrypt(base64.b64decode(sealed)))
    except (CryptoError, ValueError):
        raise WorkerError(f"{name}: what it sealed can't be opened; nothing was written") from None


def passphrase(file: Path | None, is_new: bool) -> str:
    """Read the passphrase from a file's one line, or from the terminal; twice for a new one."""
    if file is not None:
        return read_secret(file, "a file with one line", "--passphrase-file", form=LINE)
    if not sys.stdin.isatty():
        raise SettingsError(
            "no terminal to ask for the passphrase at; put it into a file: --passphrase-file FILE"
        )
    said = getpass.getpass("passphrase of the backup: ")
    if is_new and getpass.getpass("the same again: ") != said:
        raise SettingsError("the two passphrases differ; nothing was done")
    return said


def _flag(value: bool) -> str:
    return f"identities={'true' if value else 'false'}"

"""`hivewright fleet ...`: maintenance between rollouts, on all hosts at the same time."""

import argparse
import base64
import difflib
import getpass
import json
import re
import sys
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
from deploys.fleet import queries
from deploys.fleet.pyinfra_process import Answers, Pyinfra, Ran, heed_signals
from deploys.paths import STATE
from worker.errors import SettingsError, WorkerError
from worker.log import printable
from worker.runtime.files import LINE, read_secret

ASK_SECONDS = 120.0
# Stopping a worker takes at most one minute, starting it five (templates/service.j2).
SERVICE_SECONDS = 600
NUM_PARALLEL = 16
FOLLOW_SECONDS = 2.0
# journalctl's short-iso without the host: time, identifier with process id, text.
_IDENTIFIER = re.compile(r"(?P<time>\S+) hivewright-(?P<service>\S+?)\[\d+\]: (?P<text>.*)")


def stop(options: argparse.Namespace) -> None:
    """Stop services until the host boots, or until the next start or deploy."""
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
    """Print the last lines of the services' logs, each with its host and service.

    With `--follow` continue with new lines; hosts that do not answer are named once.
    """
    pyinfra = pyinfra_of(options)
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
            print(with_place(name, line), flush=True)
    if options.follow:
        _follow(pyinfra, fact, names, found)
    if not any(found.values()) and not answers.reasons:
        _refuse_unknown_unit(pyinfra, names, options.unit)
    complain(answers)


def with_place(host: str, line: str) -> str:
    """Return journalctl's line with host and service in front: `gpu-1/worker@0 2026-... text`."""
    found = _IDENTIFIER.match(line)
    if found is None:
        return f"{host} {line}"
    return f"{host}/{found['service']} {found['time']} {found['text']}"


def _follow(
    pyinfra: Pyinfra,
    fact: Sequence[str],
    names: Sequence[str],
    seen: Mapping[str, Sequence[str]],
) -> None:
    """Print new lines until the operator interrupts."""
    last = dict(seen)
    silent: set[str] = set()
    while True:
        time.sleep(FOLLOW_SECONDS)
        answers = queries.ask(pyinfra, fact, names, queries.FACT_SECONDS)
        for name, reason in answers.reasons.items():
            if name not in silent:
                print(f"{name} does not answer: {printable(reason)}", file=sys.stderr, flush=True)
        silent = set(answers.reasons)
        (found,) = answers.values
        for name, lines in found.items():
            for line in new_lines(last.get(name, ()), lines):
                print(with_place(name, line), flush=True)
            last[name] = lines


def new_lines(
    before: Sequence[str],
    now: Sequence[str],
) -> Sequence[str]:
    """Return the lines of `now` after its longest beginning that is an end of `before`."""
    for size in range(min(len(before), len(now)), 0, -1):
        if list(before[-size:]) == list(now[:size]):
            return now[size:]
    return now


def _refuse_unknown_unit(
    pyinfra: Pyinfra,
    names: Sequence[str],
    unit: str,
) -> None:
    """Raise SettingsError if no host has such a service; its log would only look empty."""
    (reports,) = queries.ask(
        pyinfra, ["deploys.fleet_facts.NodeReports"], names, queries.FACT_SECONDS
    ).values
    known = set()
    for found in reports.values():
        for report in found:
            name = report["unit"].removeprefix("hivewright-")
            known.add(name.removesuffix(".service"))
    if not any(fnmatch(each, unit) for each in known):
        close = difflib.get_close_matches(unit, sorted(known), n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"these hosts have {', '.join(sorted(known)) or 'none'}"
        )
        raise SettingsError(f"--unit {unit}: no such service on {', '.join(names)}; {hint}")


def uninstall(options: argparse.Namespace) -> None:
    """Print what would be removed, ask for confirmation, and remove it."""
    pyinfra = pyinfra_of(options)
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
            "identities, ledgers and the chain's state are removed too: only a backup can"
            " restore them"
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
    complain(answers)


def _report_waiting(futures: Mapping[str, Future[Ran]]) -> None:
    """Print the hosts that are not done to standard error, at intervals, until all are done."""
    began = time.monotonic()
    pause = progress.FIRST_SECONDS
    waiting = set(futures.values())
    while waiting:
        _, waiting = wait(waiting, timeout=pause)
        pause = progress.EVERY_SECONDS
        names = [name for name, future in futures.items() if not future.done()]
        if names:
            print(
                f"waiting for {', '.join(names)} ({time.monotonic() - began:.0f} s)",
                file=sys.stderr,
                flush=True,
            )


def pyinfra_of(options: argparse.Namespace) -> Pyinfra:
    pyinfra = Pyinfra.of_operator(options.inventory)
    pyinfra.breaks_locks = bool(getattr(options, "break_lock", False))
    return pyinfra


def _at_all(
    options: argparse.Namespace,
    operation: str,
    *arguments: str,
) -> None:
    pyinfra = pyinfra_of(options)
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


def chosen(
    pyinfra: Pyinfra,
    limits: Sequence[str] | None,
) -> list[str]:
    """Return the names of the hosts that `--limit` selects. Raises SettingsError if none match."""
    return [host["name"] for host in chosen_hosts(pyinfra, limits)]


def chosen_hosts(
    pyinfra: Pyinfra,
    limits: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """Return the hosts that `--limit` (a name, a pattern or a group) selects.

    Raises SettingsError if a limit matches no host.
    """
    hosts = pyinfra.hosts(timeout=ASK_SECONDS)
    for limit in limits or ():
        if not any(_fits(host, limit) for host in hosts):
            raise SettingsError(f"--limit {limit}: no such host or group in {pyinfra.inventory}")
    if not limits:
        return hosts
    return [host for host in hosts if any(_fits(host, limit) for limit in limits)]


def _fits(
    host: Mapping[str, Any],
    limit: str,
) -> bool:
    return fnmatch(host["name"], limit) or limit in host["groups"]


def complain(answers: Answers, then: str = "; the others are done") -> None:
    if answers.reasons:
        silent = ", ".join(
            f"{name} ({printable(reason)})" for name, reason in answers.reasons.items()
        )
        raise WorkerError(f"no answer from {silent}{then}")


def opened(
    name: str,
    sealed: str,
    key: PrivateKey,
) -> bytes:
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

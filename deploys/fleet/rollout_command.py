"""`hivewright rollout INVENTORY`: the command, and access to hosts through pyinfra."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploys import operator
from deploys.fleet import queries, report, wireguard_guard
from deploys.fleet.batches import Size
from deploys.fleet.health_gate import Wanted
from deploys.fleet.pyinfra_process import CHECKOUT, Pyinfra, Ran, heed_signals
from deploys.fleet.report import Report
from deploys.fleet.rollout import Rollout, Rules, Seen
from deploys.inventory.host_plan import COORDINATORS
from deploys.inventory.schema import pick
from worker.errors import ReleaseRefused, SettingsError, WorkerError
from worker.log import printable
from worker.runtime.cells import say
from worker.runtime.files import write_whole
from worker.runtime.host import lock_folder

# In this time the commits of all hosts are looked up, for up to a minute per repository.
ASK_SECONDS = 300.0
GO_BACK_SECONDS = 600.0


class PyinfraFleet:
    """The hosts of an inventory through pyinfra, whose output goes to `folder`/HOST.log."""

    def __init__(
        self,
        pyinfra: Pyinfra,
        folder: Path,
        deadline_seconds: float,
    ) -> None:
        self._pyinfra = pyinfra
        self._folder = folder
        self._deadline_seconds = deadline_seconds
        self._noted: set[tuple[str, str, str]] = set()

    def deploy(
        self,
        host: str,
        commit: str,
    ) -> Ran:
        log = self._log(host)
        return self._pyinfra.deploy(host, commit, log, timeout=self._deadline_seconds)

    def look(
        self,
        hosts: Sequence[str],
    ) -> dict[str, Seen]:
        """Return the hosts' reports; reasons for missing answers go to the hosts' logs."""
        found = queries.look(self._pyinfra, hosts)
        for host, reason in found.reasons.items():
            with self._log(host).open("a") as stream:
                print(f"asked what it is doing: {reason}", file=stream)
        seen = {}
        for host in hosts:
            state, reports = found.states.get(host), found.reports.get(host)
            if state is not None and reports is not None:
                self._log_last_output(host, reports)
                seen[host] = Seen(state, reports)
        return seen

    def _log_last_output(
        self,
        host: str,
        reports: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the last output of services that have ended to the host's log, once."""
        for each in reports:
            said = each.get("last_words")
            note = (host, each["unit"], str(said))
            if said and note not in self._noted:
                self._noted.add(note)
                with self._log(host).open("a") as stream:
                    print(
                        f"{each['unit']} ({each['active_state']}) said: {printable(said)}",
                        file=stream,
                    )

    def go_back(self, host: str, reason: str) -> Ran:
        name, argument = "deploys.rollback.go_back", f"reason={json.dumps(reason)}"
        return self._pyinfra.operation(
            host, name, self._log(host), argument, timeout=GO_BACK_SECONDS
        )

    def stop(self) -> None:
        self._pyinfra.stop()

    def _log(self, host: str) -> Path:
        return self._folder / f"{host.strip('@').replace('/', '-')}.log"


def run(options: argparse.Namespace) -> None:
    """Roll out, or resume.

    Raises ReleaseRefused if it was rolled back, WorkerError if a host needs attention,
    SettingsError.
    """
    heed_signals()
    pyinfra = Pyinfra.of_operator(options.inventory)
    pyinfra.breaks_locks = options.break_lock
    with tempfile.TemporaryDirectory(prefix="hivewright-plans-") as plans:
        pyinfra.plans = Path(plans)
        _roll_out(options, pyinfra)


def _roll_out(options: argparse.Namespace, pyinfra: Pyinfra) -> None:
    wanted = Wanted(options.gate_rounds, options.gate_reward, not options.no_gate_credits)
    rules = Rules(Size.parse(options.batch), wanted, options.gate_seconds)
    folder = options.output or Path("rollouts") / Path(options.inventory).stem
    file = folder / "report.json"
    # Everything is checked before anything is written to the folder.
    hosts = pyinfra.hosts(timeout=ASK_SECONDS, is_to_be_deployed=True)
    so_far = (
        _resumed(file, pyinfra.inventory, hosts)
        if options.resume
        else _new(pyinfra.inventory, hosts)
    )
    if not so_far.reason:
        wireguard_guard.require_settled(pyinfra, hosts)
    _make_folder(folder)
    with lock_folder(folder, "--output") as lock:
        # If this process is killed, its pyinfra processes continue and hold the lock until they
        # end, so no other rollout can begin before.
        pyinfra.held = (lock.fileno(),)
        if options.resume:
            # The process that held the lock until now may have made progress.
            so_far = _resumed(file, pyinfra.inventory, hosts)
        fleet = PyinfraFleet(pyinfra, folder, options.deadline)
        coordinators = [host["name"] for host in hosts if COORDINATORS in host["groups"]]
        try:
            with _bar(so_far) as (show, say):

                def save(now: Report) -> None:
                    now.write(file)
                    show(now)

                Rollout(fleet, rules, coordinators, so_far, save, say).run()
        except BaseException:
            # Ctrl-C, or an inventory that is refused.
            so_far.result = "interrupted"
            so_far.write(file)
            _say_how_to_go_on(so_far, file)
            raise
    write_whole(file.with_suffix(".html"), report.page(so_far))
    _conclude(so_far, file)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--output {folder}: {error.strerror}; expected a folder for report and logs"
        ) from None


def _new(
    inventory: str,
    hosts: Sequence[Mapping[str, Any]],
) -> Report:
    """Return a report with each host's commit, resolved now: moving branches have no effect."""
    commits: dict[tuple[str, str], str] = {}
    reports = {}
    for host in hosts:
        source = f"inventory data of {host['name']}"
        data = host["data"]
        repository = data.get("release_repository") or operator.origin(CHECKOUT, source)
        ref = str(data.get("release_ref", "main"))
        if (repository, ref) not in commits:
            commits[repository, ref] = operator.resolve(repository, ref, source)
        reports[host["name"]] = report.HostReport(commits[repository, ref])
    return Report(inventory, reports)


def _resumed(
    file: Path,
    inventory: str,
    hosts: Sequence[Mapping[str, Any]],
) -> Report:
    """Return the earlier rollout, with unsuccessful hosts pending again; others stay untouched."""
    so_far = report.read(file)
    # Earlier releases stored the path as it was given, relative to the checkout.
    if CHECKOUT / so_far.inventory != Path(inventory):
        raise SettingsError(
            f"{file}: of {so_far.inventory}; expected a rollout of {inventory}; see --output"
        )
    if so_far.result == "rolled-back":
        raise SettingsError(
            f"{file}: that release was rolled back ({so_far.reason}); fix it and start again,"
            " without --resume"
        )
    names = {host["name"] for host in hosts}
    so_far.hosts = pick(so_far.hosts, names)
    if not so_far.hosts:
        raise SettingsError(
            f"{file}: none of its hosts is in {inventory}; start again, without --resume"
        )
    if so_far.reason:
        return so_far
    left = so_far.those("unreachable", "overdue", "failed", "lost")
    for name in left:
        so_far.hosts[name].fate = "pending"
        so_far.hosts[name].reason = ""
    return so_far


class _bar:  # noqa: N801 - a context manager that reads as a function
    """A progress bar of hosts with lines above it on a terminal; only lines elsewhere."""

    def __init__(self, so_far: Report) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("rollout"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("rollout", total=len(so_far.hosts))

    def __enter__(self) -> tuple[Callable[[Report], None], Callable[[str], None]]:
        self._progress.start()
        return self._show, lambda line: say(self._progress.console, line)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show(self, now: Report) -> None:
        num_done = len(now.hosts) - len(now.those("pending"))
        self._progress.update(self._task, completed=num_done)


def _show(so_far: Report) -> None:
    Console().print(report.table(so_far))
    print(report.summary(so_far), file=sys.stdout, flush=True)


def _say_how_to_go_on(so_far: Report, file: Path) -> None:
    """Print how to continue after an interruption."""
    _show(so_far)
    what = "continues the rollback" if so_far.reason else "continues with the remaining hosts"
    print(
        f"`hivewright rollout --resume {so_far.inventory}` {what}; report: {file}",
        file=sys.stderr,
        flush=True,
    )


def _conclude(done: Report, file: Path) -> None:
    _show(done)
    if done.result in ("rolled-back", "stuck"):
        back = "all hosts that it touched were restored"
        if done.result == "stuck":
            back = (
                f"some hosts could not go back; `hivewright rollout --resume {done.inventory}`"
                " tries again"
            )
        raise ReleaseRefused(f"{done.reason}; {back}; logs and report are in {file.parent}")
    if done.result == "incomplete":
        raise WorkerError(
            f"not all hosts have it; `hivewright rollout --resume {done.inventory}` goes on with"
            f" those, once they are fixed; logs and report are in {file.parent}"
        )
    if lacking := [name for name in done.those("done") if done.hosts[name].reason]:
        raise WorkerError(
            f"all hosts have it, but {len(lacking)} of {len(done.hosts)} lack something"
            f" ({', '.join(lacking)}; the table says what); fix that and deploy them again; logs"
            f" and report are in {file.parent}"
        )

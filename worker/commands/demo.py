"""`hivewright demo`: a complete swarm on this machine, with the same processes as a fleet.

Only the settings are specific to the demo: every role is an ordinary child process with an ordinary
settings file. The demo starts them in order, shows the workers' status, and at the end compares
their records with the chain. It fails, with one line, if they differ.
"""

import argparse
import json
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from worker import settings as settings_module
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger
from worker.commands import audit, training_report
from worker.commands.demo_processes import Children
from worker.commands.plots import plot_rewards
from worker.commands.reports import swarm_table
from worker.environments.presets import DEMO_SETTINGS, REAL_MODEL_SETTINGS
from worker.errors import DemoFailed, SettingsError
from worker.runtime import host
from worker.runtime.cells import add_row, say
from worker.runtime.state_dir import StateDir
from worker.settings import Node, Settings
from worker.telemetry import status

STEP_SECONDS = 60.0  # limit for one service to start
START_SECONDS = 180.0  # limit for all workers to reach their first round
SHORT_ROUND_SECONDS, LONG_ROUND_SECONDS = 120.0, 600.0
"""The keeper's time limit for one round, with the small model and with a real one."""
MAX_WORKERS = 64  # each is a process with torch and a model
MARKER = ".hivewright-demo"
SERVICES = ("chain", "account", "bootnode", "keeper", "dashboard")
_ALL = 10**9
SHORT_GAME_SECONDS, LONG_GAME_SECONDS = 6.0, 45.0
"""Duration of a round of a game with the small model, and with a real one, which is slower."""
BET_STATES = ("confirmed", "claiming", "paid", "lost")
"""States of bets that are on the chain (worker/market/journal.py)."""


def run(options: argparse.Namespace) -> None:
    """Run the demo. Raises DemoFailed, with one line, if a check fails; SettingsError."""
    if options.workers > MAX_WORKERS:
        raise SettingsError(
            f"--workers: got {options.workers}; expected at most {MAX_WORKERS} on one machine"
        )
    output = options.output.resolve()
    demo = Demo(
        output,
        num_workers=options.workers,
        num_rounds=options.rounds,
        seed=options.seed,
        console=Console(),
        model=options.model,
        has_market=options.market,
        minutes=options.minutes,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    with _fresh_folder(output), Children(output / "logs") as children:
        demo.start(children)
        demo.watch(children)
        summary = demo.check()
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    curves = {worker["name"]: worker["rewards"] for worker in summary["workers"]}
    plot_rewards(curves, output / "rewards.png")
    demo.write_report()
    demo.report(summary)


class Demo:
    """The swarm in `output`: one folder, one settings file and one log per role."""

    def __init__(
        self,
        output: Path,
        num_workers: int,
        num_rounds: int,
        seed: int,
        console: Console,
        model: str | None = None,
        has_market: bool = False,
        minutes: int | None = None,
    ) -> None:
        """Create a demo. `model`: a folder with a real model, instead of the packaged small one.

        `minutes`: the workers begin no round after these. None: they train all of `num_rounds`.
        `has_market`: run a judge, too, and require each worker to bet.
        """
        self.has_market = has_market
        self.is_tiny = model is None
        self.worker_settings = (
            DEMO_SETTINGS if model is None else {**REAL_MODEL_SETTINGS, "model_name": model}
        )
        self.output = output
        self.num_rounds = num_rounds
        self.minutes = minutes
        self.round_seconds = SHORT_ROUND_SECONDS if self.is_tiny else LONG_ROUND_SECONDS
        self.seed = seed
        self.console = console
        self.worker_names = [f"worker-{i}" for i in range(num_workers)]
        self.rpc_url = ""
        self._metrics_ports = host.free_ports([*SERVICES, *self.worker_names])
        self.started = time.monotonic()

    def start(self, children: Children) -> None:
        """Start every role in the order of their dependencies."""
        folder = self.output
        console = self.console
        self._write_targets()
        say(console, "starting the chain, the account service and the bootnode", "dim")
        self._start_chain(children)
        self._write_secret("enrolment.token", f"demo-{self.seed}-{time.time_ns()}")
        passphrase = self._write_secret("account.passphrase", f"demo-{secrets.token_hex(16)}")
        # Chosen first, because the account service links to it.
        ports = host.free_ports(["dashboard"])
        own: dict[str, Any] = {
            "account_port": 0,
            "account_passphrase_file": str(passphrase),
            "account_dashboard_url": f"http://127.0.0.1:{ports['dashboard']}",
        }
        judge = {}
        if self.has_market:
            judge = {"market_judge_url": self._start_judge(children)}
        account_file = self._write("account", own | judge)
        account = children.start("account", account_file, "account")
        bootnode_file = self._write("bootnode", {"bootnode_host": "127.0.0.1", "bootnode_port": 0})
        bootnode = children.start("bootnode", bootnode_file, "bootnode")
        account_url = account.wait_for_file(folder / "account/address", STEP_SECONDS)
        bootnode.wait_for_file(folder / "bootnode/multiaddr", STEP_SECONDS)
        keeper = {
            "keeper_bootnode_file": str(folder / "bootnode/multiaddr"),
            "keeper_min_peers": len(self.worker_names),
            "keeper_round_seconds": self.round_seconds,
            "keeper_poll_seconds": 0.5,
            # The demo audits everything at its end.
            "audit_every_rounds": 0,
        }
        children.start("keeper", self._write("keeper", keeper), "keeper")
        dashboard_file = self._write(
            "dashboard",
            {
                "dashboard_port": ports["dashboard"],
                "dashboard_accounts_url": account_url,
                "dashboard_node_dirs": [str(folder / name) for name in self.worker_names],
                **judge,
            },
        )
        dashboard = children.start("dashboard", dashboard_file, "dashboard")
        self._start_workers(children, account_url)
        page = dashboard.wait_for_file(folder / "dashboard/address", STEP_SECONDS)
        say(console, f"the dashboard is at {page}", "dim")
        say(console, f"its owner's token is in {folder / 'dashboard/owner.token'}", "dim")
        if self.has_market:
            say(console, f"the prediction market's page is at {page}/market", "dim")
        say(console, f"accounts are at {account_url}", "dim")
        say(console, f"training; logs are in {folder / 'logs'}", "dim")

    def _start_chain(self, children: Children) -> None:
        """Start the chain and deploy the contracts."""
        chain = children.start("chain up", self._write("chain", {"anvil_port": 0}), "chain")
        self.rpc_url = chain.wait_for_file(self.output / "chain/address", STEP_SECONDS)
        # Fix the port, so that a chain started after the demo has the address in the other files.
        _, _, port = self.rpc_url.rpartition(":")
        self._write("chain", {"anvil_port": int(port)})
        deploy = self._write("deploy", {"anvil_port": 0})
        children.start("chain deploy", deploy, "deploy", ends=True).wait(STEP_SECONDS)

    def _write_secret(self, name: str, secret: str) -> Path:
        file = self.output / name
        file.touch(mode=0o600)
        file.write_text(secret + "\n")
        return file

    def _start_judge(self, children: Children) -> str:
        """Start a judge with short games, and return its URL."""
        flat = {
            "judge_port": 0,
            "judge_rounds": 2,
            "judge_round_seconds": SHORT_GAME_SECONDS if self.is_tiny else LONG_GAME_SECONDS,
            "judge_pause_seconds": 1.0,
            "chain_poll_seconds": 0.5,
            "environment_families": self.worker_settings["environment_families"],
        }
        judge = children.start("judge", self._write("judge", flat), "judge")
        url = judge.wait_for_file(self.output / "judge/address", STEP_SECONDS)
        # Fix the port, so that a judge started later has the address that the others use.
        self._write("judge", flat | {"judge_port": int(url.rpartition(":")[2])})
        say(self.console, f"the prediction market's judge is at {url}", "dim")
        return url

    def _write_targets(self) -> None:
        """Write the endpoints of all processes, for a Prometheus (monitoring/prometheus.yml)."""
        groups = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"host": "demo", "service": name}}
            for name, port in self._metrics_ports.items()
        ]
        (self.output / "targets.json").write_text(json.dumps(groups, indent=1) + "\n")

    def _start_workers(self, children: Children, account_url: str) -> None:
        """Enrol all workers at once, wait for that, then start them."""
        say(self.console, "enrolling the workers: each gets a key and an account", "dim")
        files = {}
        enrolments = []
        for name in self.worker_names:
            files[name] = self._write(name, self._worker_settings(name, account_url))
            enrolments.append(children.start("enrol", files[name], f"enrol-{name}", ends=True))
        for enrolment in enrolments:
            enrolment.wait(STEP_SECONDS)
        for name, file in files.items():
            children.start("worker", file, name, ends=True)

    def watch(self, children: Children) -> None:
        """Show the workers until all have ended.

        Raises DemoFailed if a process fails or the time is up.
        """
        workers = [children.by_name[name] for name in self.worker_names]
        patience = START_SECONDS + (self.num_rounds + 1) * self.round_seconds
        deadline = time.monotonic() + patience
        with self._display() as show:
            while any(worker.is_running for worker in workers):
                children.require_healthy()
                if time.monotonic() > deadline:
                    raise DemoFailed(
                        f"not done after {patience:.0f} s; the logs are in {self.output / 'logs'}"
                    )
                show()
                time.sleep(0.25)
            show()
        children.require_healthy()

    @contextmanager
    def _display(self) -> Iterator[Callable[[], None]]:
        """Yield a function that redraws a table; without a terminal it prints a line per round."""
        if self.console.is_terminal:
            with Live(self._table(), console=self.console, auto_refresh=False) as live:
                yield lambda: live.update(self._table(), refresh=True)
        else:
            yield partial(self._print_new_rounds, Counter())
            self.console.print(self._table())

    def check(self) -> dict[str, Any]:
        """Compare every worker's summary with the chain, and return them.

        Raises DemoFailed if they differ.
        """
        coordinator = Coordinator(self._settings({}).chain)
        audited = self._audit()
        workers = [self._summary_of(name, coordinator, audited) for name in self.worker_names]
        problems: list[str] = []
        for worker in workers:
            problems += self._problems(worker, len(workers))
        if problems:
            raise DemoFailed(
                f"{problems[0]}; {len(problems)} finding(s) in all; the logs are in"
                f" {self.output / 'logs'}"
            )
        return {
            "seed": self.seed,
            "rounds": max(worker["rounds_trained"] for worker in workers),
            "rpc_url": self.rpc_url,
            "workers": workers,
        }

    def report(self, summary: dict[str, Any]) -> None:
        """Print the last screen: results, and where the files are."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        span = max(1, min(3, summary["rounds"] // 2))
        for column in ("worker", "known as"):
            table.add_column(column, no_wrap=True)
        for column in ("rounds", f"first {span} > last {span}", "heard", "on chain"):
            table.add_column(column, justify="right", no_wrap=True)
        for worker in summary["workers"]:
            rewards = list(worker["rewards"].values())
            add_row(
                table,
                worker["name"],
                worker["animal_name"],
                str(worker["rounds_trained"]),
                f"{fmean(rewards[:span]):.2f} > {fmean(rewards[-span:]):.2f}",
                f"{len(worker['peers_heard'])} of {len(summary['workers']) - 1}",
                f"{worker['rewards_confirmed']} of {worker['rewards_earned']}",
            )
        self.console.print()
        say(
            self.console,
            "Results: mean reward, peers heard, rewards that the chain confirms",
            "bold",
        )
        self.console.print(table)
        self.console.print()
        files = {
            "report": "report.html",
            "summary": "summary.json",
            "audit": "audit/audit.json",
            "plot": "rewards.png",
            "logs": "logs",
            "metrics": "targets.json",
        }
        if self.has_market:
            files["bets"] = f"{self.worker_names[0]}/logs/prg_record.txt"
        for what, file in files.items():
            say(self.console, f"{what:8} {self.output / file}")

    def write_report(self) -> None:
        """Write report.html about all workers."""
        folders = [self.output / name for name in self.worker_names]
        shown = settings_module.load(self.output / "settings" / f"{self.worker_names[0]}.yaml")
        training_report.write(self.output / "report.html", "hivewright demo", folders, shown)

    def _audit(self) -> Counter[str]:
        """Return for each peer the number of its rewards that its signed groups confirm."""
        judge = settings_module.load(self._write("audit", self.worker_settings))
        folders = [StateDir(self.output / name).groups for name in self.worker_names]
        report = audit.audit(
            judge, self.output / "audit", folders, num_rounds=_ALL, num_rewards=_ALL
        )
        findings = report.findings.values()
        return Counter(finding.peer_id for finding in findings if finding.verdict == "audited")

    def _summary_of(
        self, name: str, coordinator: Coordinator, audited: Counter[str]
    ) -> dict[str, Any]:
        folder = self.output / name
        said = status.read(folder)
        if said is None:
            raise DemoFailed(f"{name} left no status in {folder}")
        heard: set[str] = set()
        heard_per_round: dict[str, int] = {}
        rounds = status.read_rounds(folder)
        rows = Ledger(StateDir(folder).ledger).rows()
        num_confirmed = 0
        for row in rows:
            on_chain = coordinator.submitted_reward(row.round, row.stage, row.peer_id)
            num_confirmed += on_chain == row.reward
        for line in rounds:
            heard.update(line["peers_heard"])
            heard_per_round[str(line["round"])] = len(line["peers_heard"])
        return {
            "name": name,
            "bets": said.market,
            "peer_id": said.peer_id,
            "animal_name": said.animal_name,
            "rounds_trained": said.rounds_trained,
            "rounds_reported": [row.round for row in rows],
            "rounds_finished": [line["round"] for line in rounds],
            "rounds_with_step": [line["round"] for line in rounds if line["skipped"] is None],
            "rewards": {str(line["round"]): line["reward_mean"] for line in rounds},
            "peers_heard": sorted(heard),
            "peers_heard_per_round": heard_per_round,
            "registered": coordinator.owner_of(said.peer_id) is not None,
            "rewards_earned": len(rows),
            "rewards_confirmed": num_confirmed,
            "rewards_audited": audited[said.peer_id],
        }

    def _problems(
        self,
        worker: dict[str, Any],
        num_workers: int,
    ) -> list[str]:
        name = worker["name"]
        problems = []
        trained, least = worker["rounds_trained"], 1 if self.minutes else self.num_rounds
        if not least <= trained <= self.num_rounds:
            expected = f"{least} to {self.num_rounds}" if self.minutes else str(self.num_rounds)
            problems.append(f"{name} trained {trained} rounds, expected {expected}")
        # A round without a training step (all of its tasks solved, say) is reported, too.
        reported, finished = set(worker["rounds_reported"]), set(worker["rounds_finished"])
        if reported != finished:
            problems.append(
                f"{name} reported rounds {sorted(reported - finished)} that it did not finish, and"
                f" not the rounds {sorted(finished - reported)} that it did"
            )
        if len(worker["peers_heard"]) != num_workers - 1:
            problems.append(
                f"{name} heard {len(worker['peers_heard'])} peers, expected {num_workers - 1}"
            )
        bets = {state: count for state, count in worker["bets"].items() if state in BET_STATES}
        if self.has_market and not bets:
            problems.append(f"{name} has bet on no question of the judge ({worker['bets']})")
        if not worker["registered"]:
            problems.append(f"{name} ({worker['peer_id']}) is not registered on the chain")
        if worker["rewards_confirmed"] != worker["rewards_earned"]:
            problems.append(
                f"the chain confirms {worker['rewards_confirmed']} of {worker['rewards_earned']}"
                f" rewards of {name}"
            )
        if worker["rewards_audited"] != worker["rewards_earned"]:
            problems.append(
                f"the groups that {name} signed confirm {worker['rewards_audited']} of"
                f" {worker['rewards_earned']} rewards of it (audit/audit.json)"
            )
        return problems

    def _worker_settings(
        self,
        name: str,
        account_url: str,
    ) -> dict[str, Any]:
        return {
            "node_name": name,
            "node_max_rounds": self.num_rounds,
            "node_max_minutes": self.minutes,
            "node_seed": self.seed,
            "swarm_audit_rounds": self.num_rounds + 1,
            "model_device": "cpu",
            "model_threads": 1,
            "swarm_host": "127.0.0.1",
            "chain_account_url": account_url,
            "chain_enrolment_token_file": str(self.output / "enrolment.token"),
            "chain_poll_seconds": 0.5,
            "market_poll_seconds": 0.5,
            **self.worker_settings,
        }

    def _write(
        self,
        role: str,
        flat: dict[str, Any],
    ) -> Path:
        """Write the role's settings file; each role's state is in a folder of its own."""
        folder = self.output / role
        folder.mkdir(exist_ok=True)
        file = self.output / "settings" / f"{role}.yaml"
        file.parent.mkdir(exist_ok=True)
        common = {"node_state_dir": str(folder), "metrics_port": self._metrics_ports.get(role)}
        file.write_text(settings_module.dump(self._settings({**common, **flat})))
        return file

    def _settings(self, flat: dict[str, Any]) -> Settings:
        folder = self.output
        places = {
            "anvil_state_file": str(folder / "chain/state.json"),
            "account_state_dir": str(folder / "account"),
            "account_enrolment_token_file": str(folder / "enrolment.token"),
            "keeper_state_dir": str(folder / "keeper"),
            "dashboard_state_dir": str(folder / "dashboard"),
            "judge_state_dir": str(folder / "judge"),
            "judge_key_file": str(folder / "keeper/judge.key"),
            "dashboard_audit_file": str(folder / "audit/audit.json"),
            "dashboard_targets_file": str(folder / "targets.json"),
            "dashboard_show_fleet": True,
            "bootnode_state_dir": str(folder / "bootnode"),
        }
        if "chain_account_url" not in flat:
            places["chain_deployment_file"] = str(folder / "keeper/deployment.json")
        return settings_module.from_flat({**places, **flat}, "demo settings")

    def _table(self) -> Table:
        said = [status.read(self.output / name) for name in self.worker_names]
        known = [node for node in said if node is not None]
        table = swarm_table(known)
        num_done = min((node.rounds_trained for node in known), default=0)
        seconds = time.monotonic() - self.started
        table.caption = f"{num_done} of {self.num_rounds} rounds done by all, {seconds:.0f} s"
        if num_done == 0:
            table.caption = f"the workers load torch and their model, {seconds:.0f} s"
        table.caption_justify = "left"
        return table

    def _print_new_rounds(self, positions: Counter[str]) -> None:
        """Print the rounds after these positions in the workers' histories, and move them on."""
        for name in self.worker_names:
            lines, positions[name] = status.read_lines(self.output / name, positions[name])
            for line in lines:
                if line.get("part"):
                    continue
                say(
                    self.console,
                    f"{name} round {line['round']} reward {line['reward_mean']:.2f} loss"
                    f" {line['loss']:.4f} heard {len(line['peers_heard'])} groups"
                    f" {line['groups_local']}+{line['groups_external']} {line['seconds']:.1f} s",
                )


def _fresh_folder(output: Path) -> IO[str]:
    """Empty `output`, if an earlier demo made it, and return its lock.

    Raises SettingsError if the folder has other files, ResourceError if another demo runs in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--output {output}: {error.strerror}; expected a folder that can be made"
        ) from None
    if any(output.iterdir()) and not (output / MARKER).exists():
        raise SettingsError(
            f"--output {output}: has files that no demo wrote; expected a new or an earlier demo's"
            " folder"
        )
    (output / MARKER).touch()
    lock = host.lock_folder(output, "--output")
    ours = (MARKER, StateDir.lock)
    left = [entry for entry in output.iterdir() if entry.name not in ours]
    if left:
        print(
            f"starting again: what an earlier demo left in {output} is removed ({len(left)} files"
            " and folders)",
            flush=True,
        )
    for entry in left:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    host.require_disk(output, Node().min_free_disk_mb, "--output")
    return lock


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """End the demo, children first; Ctrl-C also works if a shell's `&` ignored it."""
    raise KeyboardInterrupt

"""A worker that exchanges with registered peers only refuses others until they register."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from worker import environments
from worker import settings as settings_module
from worker.chain import registration
from worker.chain.coordinator import Coordinator
from worker.commands.demo import Demo
from worker.commands.demo_processes import Children
from worker.environments.presets import DEMO_SETTINGS
from worker.records import Collected, Group, round_seed
from worker.swarm import identity
from worker.swarm.exchange.verify import Verifier
from worker.swarm.swarm import Swarm

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(420)]

PATIENCE_SECONDS = 120.0
NO_END = 10_000  # rounds


class PickyDemo(Demo):
    def _worker_settings(self, name: str, account_url: str) -> dict[str, Any]:
        return {
            **super()._worker_settings(name, account_url),
            "swarm_only_registered": True,
            "swarm_keep_rounds": 20,
        }


class ForeignClient:
    """A node without an account: the swarm part, and a client of the chain."""

    def __init__(self, demo: Demo, folder: Path) -> None:
        self.folder = folder
        self.settings = settings_module.from_flat(
            {
                "swarm_host": "127.0.0.1",
                "swarm_bootnodes": (demo.output / "bootnode/multiaddr").read_text().split(),
                "swarm_collect_timeout_seconds": 5.0,
                "swarm_announce_every_seconds": 5.0,
                "chain_account_url": (demo.output / "account/address").read_text().strip(),
                **DEMO_SETTINGS,
            },
            "outsider",
        )
        self.identity = identity.create(folder / "swarm.pem")
        self.environment = environments.load(self.settings.environment)
        verifier = Verifier(self.environment, self.settings.swarm, max_group_size=8)
        self.swarm = Swarm(self.settings.swarm, folder / "swarm.pem", folder, verifier)
        # The account service answers registered nodes only: the chain itself is asked.
        self.coordinator = Coordinator(demo._settings({}).chain)

    def take_part(self) -> Collected:
        """Return the chain's current round."""
        round = self.coordinator.current_round()
        tasks = self.environment.sample(round_seed(self.identity.peer_id, round), 2)
        self.swarm.publish(round, [Group(task, ("7", "no idea")) for task in tasks])
        return self.swarm.collect(round, 4)

    def register(self, demo: Demo) -> None:
        token = (demo.output / "enrolment.token").read_text().strip()
        registration.enrol(self.identity, token, self.settings.chain, self.folder)


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def test_outsider_is_refused_until_it_is_registered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demo = PickyDemo(tmp_path / "demo", 1, NO_END, 1, Console(quiet=True))
    demo.output.mkdir()
    with Children(demo.output / "logs") as children:
        demo.start(children)
        outsider = ForeignClient(demo, tmp_path)
        outsider.swarm.start()
        try:
            see_both_sides(demo, children, outsider, caplog)
        finally:
            outsider.swarm.close()


def see_both_sides(
    demo: Demo, children: Children, outsider: ForeignClient, caplog: pytest.LogCaptureFixture
) -> None:
    def learn() -> bool:
        children.require_healthy()
        return bool(outsider.take_part().groups)

    def refused() -> int:
        return swarm.status().refused_by_peers.get("not-allowed", 0)

    me, swarm = outsider.identity.peer_id, outsider.swarm
    wait_until(swarm.peers, PATIENCE_SECONDS, "the new node knows the worker")
    with caplog.at_level(logging.WARNING):
        wait_until(
            lambda: learn() or refused(), PATIENCE_SECONDS, "the worker has refused the new node"
        )
    assert swarm.status().groups_fetched == 0
    assert swarm.status().state == "training-alone"
    why = (
        "reason=not-allowed: this node exchanges groups only with peers that were registered on the"
        " chain"
    )
    [worker] = swarm.peers()
    assert f"request refused by peer={worker}" in caplog.text
    assert why in caplog.text
    log = demo.output / "logs/worker-0.log"
    wait_until(
        lambda: f"request refused peer={me} {why}" in log.read_text(), 10, "the worker says it too"
    )
    assert swarm.status().groups_offered == 0  # nor did the worker ask the new node

    outsider.register(demo)
    wait_until(learn, PATIENCE_SECONDS, "the worker's groups come")
    assert swarm.status().state == "connected"
    wait_until(
        lambda: learn() and swarm.status().groups_offered > 0,
        PATIENCE_SECONDS,
        "and it asks for ours",
    )
    report = json.loads((demo.output / "worker-0/status.json").read_text())
    assert report["swarm"]["requests_refused"]["not-allowed"] >= 1
    assert report["rounds_trained"] > 0

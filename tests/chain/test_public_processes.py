"""A worker and an audit as processes that know the chain by a public address only."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from account_service import account_settings, serving
from public_rpc import ODD_ANSWERS, PublicRpc, public
from public_swarm import public_old_chain, public_swarm, through  # noqa: F401 - fixtures

from tests import preloaded
from worker import enrolment, settings
from worker.chain.ledger import Ledger
from worker.environments.presets import DEMO_SETTINGS

SECONDS = 120
"""Limit for the whole test on a busy machine; alone it takes half a minute."""
ROUNDS = 2


def write_settings(folder: Path, chain: settings.Settings, seed: int) -> Path:
    small: dict[str, Any] = {
        "node_state_dir": str(folder / "node"),
        "node_max_rounds": ROUNDS,
        "node_seed": seed,
        "swarm_host": "127.0.0.1",
        "environment_tasks_per_round": 4,
        "trainer_local_groups": 2,
        "trainer_external_groups": 0,
    }
    made = settings.from_flat({**DEMO_SETTINGS, **small}, "test")
    file = folder / "node.yaml"
    file.write_text(settings.dump(made.model_copy(update={"chain": chain.chain})))
    return file


def be_odd_now_and_then(proxy: PublicRpc, every: int = 5) -> None:
    """Answer each `every`th request with one of the useless answers, in turn."""
    kinds = list(ODD_ANSWERS)

    def is_odd(method: str, number: int) -> bool:
        proxy.odd = kinds[number // every % len(kinds)]
        return number % every == 0

    proxy.is_odd = is_odd
    proxy.odd = kinds[0]


def hivewright(log: Path, *arguments: str | Path) -> "subprocess.Popen[str]":
    with log.open("w") as stderr:
        return preloaded.Popen(
            [sys.executable, "-m", "worker", *arguments],
            "worker.node",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )


def ended(process: "subprocess.Popen[str]", log: Path, deadline: float) -> str:
    """Return what the process printed; fail unless it ends in time with code 0."""
    try:
        printed, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()[-4000:]
    return printed


@pytest.mark.timeout(SECONDS + 30)
def test_worker_and_audit_do_their_work_through_a_public_address(swarm, old_chain, tmp_path):
    deadline = time.monotonic() + SECONDS
    manners = {"range_limit": 10, "dialect": "larger", "throttle_after": 20, "retry_after": 0.3}
    with (
        public(old_chain, **manners) as node_rpc,
        public(old_chain, **manners) as audit_rpc,
        serving(account_settings(swarm.settings, tmp_path / "account")) as service,
    ):
        token_file = tmp_path / "account/enrolment.token"
        chain = through(
            swarm, node_rpc.url, account_url=service.url, enrolment_token_file=token_file
        )
        file = write_settings(tmp_path, chain, seed=1)
        enrolment.run(settings.load(file))
        first = swarm.coordinator.current_round()

        be_odd_now_and_then(node_rpc)
        worker = hivewright(tmp_path / "worker.log", "worker", "--settings", file)
        ledger = tmp_path / "node/ledger.db"
        while worker.poll() is None and time.monotonic() < deadline:
            recorded = [row.round for row in Ledger(ledger).rows()] if ledger.exists() else []
            if swarm.coordinator.current_round() in recorded:
                swarm.advance()
            time.sleep(0.2)
        ended(worker, tmp_path / "worker.log", deadline)
        rows = Ledger(ledger).rows()
        peer_id = rows[0].peer_id
        assert [row.round for row in rows] == list(range(first, first + ROUNDS))
        assert [row.reward_state for row in rows] == ["confirmed"] * ROUNDS
        on_chain = [
            swarm.coordinator.submitted_reward(row.round, row.stage, peer_id) for row in rows
        ]
        assert on_chain == [row.reward for row in rows]
        assert node_rpc.injected["429"] > 0
        assert len(node_rpc.injected.keys() & ODD_ANSWERS.keys()) > 3
        assert node_rpc.early == 0

        be_odd_now_and_then(audit_rpc)
        judge = write_settings(tmp_path / "node", through(swarm, audit_rpc.url), seed=1)
        folders = ("--groups", tmp_path / "node/groups", "--output", tmp_path / "audit")
        auditing = hivewright(
            tmp_path / "audit.log", "audit", "--settings", judge, *folders, "--json"
        )
        report = json.loads(ended(auditing, tmp_path / "audit.log", deadline))
    verdicts = {
        f["round"]: (f["verdict"], f["reason"])
        for f in report["rewards"]
        if f["peer_id"] == peer_id
    }
    assert verdicts == dict.fromkeys(range(first, first + ROUNDS), ("audited", None))
    assert max(audit_rpc.ranges()[6:]) <= 10
    assert audit_rpc.injected["range"] > 0
    assert audit_rpc.early == 0

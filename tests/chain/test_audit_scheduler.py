"""The keeper's audit as a process that finds real peers, asks them, and scores real tasks."""

import json
import logging
from contextlib import closing
from pathlib import Path

import pytest
from account_service import eventually

from worker import environments, settings
from worker.chain.audit_scheduler import Audits
from worker.environments.presets import DEMO_FAMILIES
from worker.records import Group, milli_reward, round_seed
from worker.swarm import identity
from worker.swarm.exchange.verify import Verifier
from worker.swarm.swarm import Swarm

MIX = settings.Environment(families=DEMO_FAMILIES)


def serve(chain, identity_file: Path, peer_id: str, folder: Path, exaggeration: int) -> Swarm:
    """Run a peer on loopback that answered half of round 0 right and submitted more."""
    environment = environments.load(MIX)
    section = settings.Swarm(host="127.0.0.1")
    folder.mkdir()
    swarm = Swarm(section, identity_file, folder, Verifier(environment, section, 256))
    swarm.start()
    tasks = environment.sample(round_seed(peer_id, 0), 4)
    groups = [
        Group(task, (f"<answer>{environment.answer(task)}</answer>", "no idea")) for task in tasks
    ]
    earned = milli_reward(
        [sum(environment.score(group.task, group.completions)) / 2 for group in groups]
    )
    digest = swarm.publish(0, groups).digest
    account = chain.new_account(peer_id)
    call = chain.coordinator.submit_reward(0, 0, earned + exaggeration, peer_id, digest)
    assert chain.send(account, call).succeeded
    return swarm


def finished(audits: Audits, round: int) -> bool:
    audits.see(round)
    return audits._process is None


@pytest.mark.slow
def test_keeper_finds_the_peers_and_names_the_liar(chain, tmp_path, caplog) -> None:
    honest_key, liar_key = tmp_path / "honest.pem", tmp_path / "liar.pem"
    honest, liar = identity.create(honest_key).peer_id, identity.create(liar_key).peer_id
    with (
        closing(serve(chain, honest_key, honest, tmp_path / "honest", 0)) as one,
        closing(serve(chain, liar_key, liar, tmp_path / "liar", 1)) as two,
    ):
        eventually(lambda: one.status().addresses and two.status().addresses)
        addresses = (*one.status().addresses, *two.status().addresses)
        swarm = settings.Swarm(host="127.0.0.1", bootnodes=addresses)
        update = {"swarm": swarm, "environment": MIX, "audit": settings.Audit(every_rounds=2)}
        audits = Audits(chain.settings.model_copy(update=update), tmp_path / "audit")
        with closing(audits), caplog.at_level(logging.INFO):
            assert finished(audits, 0)
            assert finished(audits, 1)
            audits.see(2)
            eventually(lambda: finished(audits, 2), 100)
    report = json.loads((tmp_path / "audit/audit.json").read_text())
    verdicts = {
        entry["peer_id"]: (entry["verdict"], entry["reason"]) for entry in report["rewards"]
    }
    assert verdicts[honest] == ("audited", None), (tmp_path / "audit/audit.log").read_text()
    assert verdicts[liar][0] == "contradicted"
    assert any(line.startswith(f"contradicted: {liar} of account ") for line in caplog.messages)


def test_audit_that_fails_is_said_with_its_last_line_and_harms_nothing(
    chain, tmp_path, caplog
) -> None:
    away = chain.settings.chain.model_copy(
        update={"rpc_url": ("http://127.0.0.1:9",), "deployment_file": None}
    )
    update = {
        "chain": away.model_copy(update={"contract": chain.deployment.contract}),
        "audit": settings.Audit(every_rounds=1),
    }
    with closing(Audits(chain.settings.model_copy(update=update), tmp_path / "audit")) as audits:
        audits.see(5)
        audits.see(6)
        eventually(lambda: finished(audits, 6), 60)
    (said,) = caplog.messages
    assert said.startswith(
        "audit failed code=6 hivewright audit: ChainUnreachable (exit 6): http://127.0.0.1:9"
    )


def test_audits_that_are_switched_off_start_nothing(chain, tmp_path) -> None:
    audits = Audits(chain.settings, tmp_path / "audit")
    for round in range(100):
        assert finished(audits, round)
    assert not (tmp_path / "audit").exists()

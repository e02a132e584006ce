"""Node, dashboard and chain say the same of every reward, whatever faults came in between.

A random walk of a node that earns, restarts and loses answers on both of its ways, with a dashboard
that reads the chain through a bad network. At any time no view may show more than was earned; at
the end all three must be equal.
"""

import random
from contextlib import ExitStack

import pytest
from account_service import at_random, eventually, faulty
from prometheus_client.parser import text_string_to_metric_families
from settling import SettlingNode, advance, impatience, settling_node, settling_service  # noqa: F401 - fixtures

from worker.chain import settlement as settlement_module
from worker.chain.settlement import Settlement
from worker.dashboard.reader import Reader
from worker.telemetry import metrics
from worker.telemetry.status import NodeStatus

NUM_ROUNDS = 6


def ledger_figures(settling: Settlement) -> dict[str, float]:
    """Return what the node's metrics say of its rewards, as node.py fills them in."""
    now = settling.status()
    node = NodeStatus("a", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0")
    node.ledger = {name: getattr(now, name) for name in ("earned", "confirmed", "rejected")}
    return {
        sample.labels["state"]: sample.value
        for family in text_string_to_metric_families(metrics.render(node))
        for sample in family.samples
        if sample.name == "hivewright_ledger"
    }


def of_peer(reader: Reader, peer_id: str) -> dict[int, int]:
    """Return the rewards that the dashboard shows of a peer, by round."""
    for peer in reader.content()["peers"]:
        if peer["peer_id"] == peer_id:
            return dict(peer["rewards"])
    return {}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_three_views_agree_after_random_faults(chain, service, node, seed, monkeypatch) -> None:
    monkeypatch.setattr(settlement_module, "RESEND_SECONDS", 2.0)
    monkeypatch.setattr(settlement_module, "_MAX_BACKOFF_SECONDS", 0.3)
    rng = random.Random(seed)
    with ExitStack() as stack:
        account = stack.enter_context(faulty(service.url, at_random(seed, 0.25)))
        rpc = stack.enter_context(faulty(chain.deployment.rpc_url, at_random(seed + 100, 0.15)))
        ways = {
            "account_url": account.url,
            "rpc_url": rpc.url,
            "contract": chain.deployment.contract,
            "timeout_seconds": 2.0,
        }
        through_faults = {"rpc_url": (rpc.url,), "timeout_seconds": 2.0}
        parsed = chain.settings.chain.model_copy(update=through_faults)
        reader = Reader(chain.settings.model_copy(update={"chain": parsed}))
        for round in range(NUM_ROUNDS):
            node.earn(round)
            with node.settling(**ways) as settling:  # a restart of the node in each round
                if rng.random() < 0.6:
                    settling.flush(rng.random() * 3)
                reader.look()
                figures = ledger_figures(settling)
                assert figures["confirmed"] <= figures["earned"] == round + 1
            earned = {row.round: row.reward for row in node.ledger.rows()}
            assert of_peer(reader, node.peer_id).items() <= earned.items()
            advance(chain, 1)
        with node.settling(**ways) as settling:
            assert settling.flush(40), (settling.status(), node.states())
            figures = ledger_figures(settling)
        eventually(lambda: reader.look() and reader.content()["round"] == NUM_ROUNDS)
    node.assert_exactly_once()
    earned = {row.round: row.reward for row in node.ledger.rows()}
    total = chain.coordinator.total_rewards([node.peer_id])
    (shown,) = [p for p in reader.content()["peers"] if p["peer_id"] == node.peer_id]
    assert figures == {"earned": NUM_ROUNDS, "confirmed": NUM_ROUNDS, "rejected": 0}
    assert dict(shown["rewards"]) == earned
    assert [shown["total_reward"]] == total == [sum(earned.values())]
    means = {each["round"]: each["mean_reward"] for each in reader.content()["rounds"]}
    assert means == {round: float(reward) for round, reward in earned.items()}

"""Node, dashboard and chain say the same of every reward, whatever faults came in between.

hypothesis makes walks of a node that earns, restarts and loses answers on both of its ways, with a
dashboard that reads the chain through a bad network and forgets what it knew. At any time no view
may show more than was earned; at the end of each walk all three must be equal.
"""

from dataclasses import dataclass

import hypothesis
from account_service import at_random, eventually, faulty
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from settling import SettlingNode, advance, impatience, settling_node, settling_service  # noqa: F401 - fixtures

from worker.chain import settlement as settlement_module
from worker.chain.settlement import Settlement
from worker.dashboard.reader import Reader
from worker.telemetry import metrics
from worker.telemetry.status import NodeStatus


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


@dataclass(frozen=True)
class Step:
    """One round with its faults.

    `account_loss`, `rpc_loss`: shares of requests to account service and chain that fail;
    `seconds`: time that the settlement gets; `forgets`: the dashboard starts without its memory.
    """

    account_loss: float
    rpc_loss: float
    seconds: float
    forgets: bool


LOSS = st.sampled_from([0.0, 0.1, 0.25, 0.5])
STEPS = st.builds(Step, LOSS, LOSS, st.sampled_from([0.0, 0.5, 2.0]), st.booleans())


class Views:
    """A node, and a dashboard that reads the same chain; each step has faults of its own."""

    def __init__(self, chain, service, node) -> None:
        self.chain, self.service, self.node = chain, service, node
        self.reader = self._new_reader(chain.deployment.rpc_url)
        self.num_rounds = 0

    def _new_reader(self, rpc_url: str) -> Reader:
        parsed = self.chain.settings.chain.model_copy(
            update={"rpc_url": (rpc_url,), "timeout_seconds": 2.0}
        )
        return Reader(self.chain.settings.model_copy(update={"chain": parsed}))

    def go(self, step: Step, seed: int) -> None:
        """Earn a round, restart the node, settle for a while; no view may show more than that."""
        rpc_url = self.chain.deployment.rpc_url
        with (
            faulty(self.service.url, at_random(seed, step.account_loss)) as account,
            faulty(rpc_url, at_random(seed + 1, step.rpc_loss)) as rpc,
        ):
            if step.forgets:
                self.reader = self._new_reader(rpc.url)
            self.node.earn(self.num_rounds)
            self.num_rounds += 1
            ways = {
                "account_url": account.url,
                "rpc_url": rpc.url,
                "contract": self.chain.deployment.contract,
                "timeout_seconds": 2.0,
            }
            with self.node.settling(**ways) as settling:
                settling.flush(step.seconds)
                self.reader.look()
                figures = ledger_figures(settling)
        assert figures["confirmed"] <= figures["earned"] == self.num_rounds
        assert of_peer(self.reader, self.node.peer_id).items() <= self.earned.items()
        advance(self.chain, 1)

    @property
    def earned(self) -> dict[int, int]:
        return {row.round: row.reward for row in self.node.ledger.rows()}

    def require_agreement(self) -> None:
        """Let everything settle without faults, and compare the three views."""
        with self.node.settling() as settling:
            assert settling.flush(40), (settling.status(), self.node.states())
            figures = ledger_figures(settling)
        reader = self._new_reader(self.chain.deployment.rpc_url)
        eventually(lambda: reader.look() and reader.content()["round"] == self.num_rounds)
        self.node.assert_exactly_once()
        count = self.num_rounds
        assert figures == {"earned": count, "confirmed": count, "rejected": 0}
        (shown,) = [p for p in reader.content()["peers"] if p["peer_id"] == self.node.peer_id]
        total = self.chain.coordinator.total_rewards([self.node.peer_id])
        assert dict(shown["rewards"]) == self.earned
        assert [shown["total_reward"]] == total == [sum(self.earned.values())]
        means = {each["round"]: each["mean_reward"] for each in reader.content()["rounds"]}
        assert means == {round: float(reward) for round, reward in self.earned.items()}


def test_three_views_agree_after_random_faults(chain, service, node, monkeypatch) -> None:
    """Each walk goes on from the rounds of the ones before, so none of them is shrunk."""
    monkeypatch.setattr(settlement_module, "RESEND_SECONDS", 2.0)
    monkeypatch.setattr(settlement_module, "_MAX_BACKOFF_SECONDS", 0.3)
    views = Views(chain, service, node)

    @hypothesis.settings(
        max_examples=4,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    @hypothesis.given(st.lists(STEPS, min_size=2, max_size=3), st.integers(0, 2**20))
    def walk(steps: list[Step], seed: int) -> None:
        for number, step in enumerate(steps):
            views.go(step, seed + 10 * number)
        views.require_agreement()

    walk()
    assert views.num_rounds >= 8

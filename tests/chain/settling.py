"""An enrolled node with its ledger, and short time limits, for the tests of the settlement."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from account_service import ENROLMENT_TOKEN, Running, account_settings, serving, some_identity

from worker import settings
from worker.chain import settlement as settlement_module
from worker.chain import transaction_queue as sender_module
from worker.chain.account_client import AccountClient
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger
from worker.chain.registration import enrol
from worker.chain.settlement import Settlement


class SettlingNode:
    """An enrolled node with a ledger, settled by one Settlement after another."""

    def __init__(self, chain, service: Running, folder: Path, shared: Path) -> None:
        self.chain = chain
        self.service = service
        self.folder = folder
        self.identity = some_identity(shared)
        self.peer_id = self.identity.peer_id
        enrol(self.identity, ENROLMENT_TOKEN, service.node_chain(), folder)
        self.ledger = Ledger(folder / "ledger.db")

    def earn(self, *rounds: int) -> None:
        for round in rounds:
            self.ledger.record(round, 0, self.peer_id, 100 + round, ["w" * (round + 1)])

    def coordinator(self, parsed: settings.Chain) -> Coordinator:
        return Coordinator(settings.chain_of_node(parsed, self.folder))

    @contextmanager
    def settling(self, is_flushed: bool = False, **changes: object) -> Iterator[Settlement]:
        parsed = self.service.node_chain(**changes)
        settling = Settlement(
            self.ledger, self.coordinator(parsed), AccountClient(parsed, self.folder), parsed
        )
        settling.start()
        try:
            if is_flushed:
                assert settling.flush(60), (settling.status(), self.ledger.unsettled())
            yield settling
        finally:
            settling.close()

    def settle(self, **changes: object) -> None:
        with self.settling(is_flushed=True, **changes):
            pass

    def states(self) -> list[tuple[str, str | None]]:
        return [(row.reward_state, row.vote_state) for row in self.ledger.rows()]

    def assert_exactly_once(self) -> None:
        """Assert that the chain has every row of the ledger, and nothing more."""
        rows = self.ledger.rows()
        read = self.chain.coordinator
        assert {(row.reward_state, row.vote_state) for row in rows} == {("confirmed", "confirmed")}
        assert read.total_rewards([self.peer_id]) == [sum(row.reward for row in rows)]
        for row in rows:
            assert read.submitted_reward(row.round, row.stage, row.peer_id) == row.reward
            assert read.votes(row.round, row.peer_id) == list(row.winners)


@pytest.fixture(autouse=True)
def impatience(monkeypatch) -> None:
    """Shorten the time after which forgotten transactions are sent again."""
    monkeypatch.setattr(sender_module, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(settlement_module, "RESEND_SECONDS", 5.0)


@pytest.fixture(name="service")
def settling_service(chain, tmp_path):
    with serving(account_settings(chain.settings, tmp_path / "account")) as running:
        yield running


@pytest.fixture(name="node")
def settling_node(chain, service, tmp_path, tmp_path_factory) -> SettlingNode:
    return SettlingNode(chain, service, tmp_path / "node", tmp_path_factory.getbasetemp())


def advance(chain, rounds: int) -> None:
    for _ in range(rounds):
        chain.advance()

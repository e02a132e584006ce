"""Recognising our own market: one bad answer does not make it a foreign one."""

import pytest

from worker.chain.client import Unanswered
from worker.chain.coordinator import Coordinator
from worker.chain.market import Market
from worker.errors import ContractRefused


@pytest.fixture
def failing(hall, monkeypatch):
    """Return a function that lets the next reads of a new client fail, and the client."""
    market = Market(hall.market.client, hall.market.address)
    read = market.read

    def make(*errors: Exception) -> Market:
        left = list(errors)

        def fail_first(name: str, *arguments: object) -> object:
            if left:
                raise left.pop(0)
            return read(name, *arguments)

        monkeypatch.setattr(market, "read", fail_first)
        return market

    return make


@pytest.mark.parametrize("error", [Unanswered("no state"), ContractRefused("", "reverted")])
def test_one_missing_answer_makes_our_market_no_foreign_one(hall, failing, error):
    assert failing(error).version == hall.market.version is not None


def test_two_refusals_are_those_of_a_foreign_market(failing):
    refusal = ContractRefused("", "reverted")
    market = failing(refusal, refusal)
    assert market.version is None
    assert market.version is None  # and for good


def test_node_without_the_contract_is_asked_again_later(hall, failing, monkeypatch):
    market = failing(Unanswered("no state"))
    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "has_code", lambda *_: False)
        with pytest.raises(Unanswered):
            _ = market.version
    assert market.version == hall.market.version is not None

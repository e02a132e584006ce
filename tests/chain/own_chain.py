"""A chain of its own for a test that moves its clock, or mines its blocks by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.chain.conftest import Chain
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.settings import Settings


@contextmanager
def own_chain(place: Settings) -> Iterator[Chain]:
    """Run an anvil with a deployed contract until the block ends."""
    with anvil.running(place.anvil, place.chain.id) as (_, url):
        section = place.chain.model_copy(update={"rpc_url": (url,)})
        there = place.model_copy(update={"chain": section})
        deployment = anvil.deploy(there)
        coordinator = Coordinator(there.chain)
        coordinator.check()
        yield Chain(there, deployment, anvil.load_owner(there.keeper), coordinator)


def ask(chain: Chain, method: str, *parameters: Any) -> Any:
    """Call a method of anvil that only tests use."""
    answer = chain.coordinator.web3.provider.make_request(method, list(parameters))
    assert "error" not in answer, answer
    return answer["result"]


def skip_seconds(chain: Chain, seconds: int) -> None:
    """Move the chain's clock forward, and mine a block."""
    ask(chain, "evm_increaseTime", seconds)
    ask(chain, "evm_mine")

"""A client of a public address: limits on logs, pruned state, throttling."""

import json
import time

import pytest
from public_rpc import RANGE_DIALECTS, public
from public_swarm import (
    BEFORE,
    client_through,
    public_forgetful,
    public_old_chain,
    public_swarm,
)

from worker.chain.embedded import anvil
from worker.chain.rpc import Throttled, retry_after
from worker.errors import ChainUnreachable

__all__ = ["public_forgetful", "public_old_chain", "public_swarm"]  # fixtures


# ---- the log


@pytest.mark.parametrize("dialect", RANGE_DIALECTS)
def test_log_is_read_whole_whatever_the_limit_is_called(swarm, old_chain, dialect):
    with public(old_chain, range_limit=10, dialect=dialect) as proxy:
        client = client_through(swarm, proxy.url)
        client.check()
        for newest_first in (False, True):
            found = [
                event.arguments["peerId"]
                for event in client.events("RewardSubmitted", newest_first=newest_first)
            ]
            assert found == (["b", "a", "b", "a"] if newest_first else ["a", "b", "a", "b"])
        widths = proxy.ranges()
        assert proxy.injected["range"] <= 6  # the limit is learned once
        assert max(widths[6:]) <= 10
        starts = [
            int(params[0]["fromBlock"], 16)
            for method, params in proxy.asked
            if method == "eth_getLogs"
        ]
        assert min(starts) >= BEFORE


def test_limit_of_one_block_is_met_and_less_is_an_outage(swarm, old_chain):
    newest = swarm.coordinator.block_number()
    with public(old_chain, range_limit=1) as proxy:
        client = client_through(swarm, proxy.url)
        assert list(client.events("RewardSubmitted", from_block=newest - 20)) == []
        proxy.range_limit = 0
        with pytest.raises(
            ChainUnreachable, match=r"eth_getLogs of RewardSubmitted: .* refuses .* exceeds limit"
        ):
            list(client.events("RewardSubmitted", from_block=newest - 20))


# ---- where the contract begins


def test_first_block_is_written_down_by_the_deploy_and_found_without(swarm, old_chain, forgetful):
    written = json.loads((swarm.settings.keeper.state_dir / "deployment.json").read_text())[
        "contract_block"
    ]
    assert written == swarm.coordinator.first_block() > BEFORE
    with public(old_chain) as proxy:
        client = client_through(swarm, proxy.url)
        assert client.first_block() == written
        assert proxy.methods()["eth_getCode"] < 20
        # Once for this process.
        assert client_through(swarm, proxy.url).first_block() == written
        assert proxy.methods()["eth_getCode"] < 20
        assert client_through(swarm, proxy.url, contract_block=7).first_block() == 7


def test_deploy_again_keeps_the_first_block(swarm):
    file = swarm.settings.keeper.state_dir / "deployment.json"
    before = json.loads(file.read_text())
    anvil.deploy(swarm.settings)
    assert json.loads(file.read_text()) == before


def test_deploy_again_finds_the_first_block_of_a_contract_of_before(swarm, forgetful):
    file = swarm.settings.keeper.state_dir / "deployment.json"
    before = json.loads(file.read_text())
    file.write_text(
        json.dumps({key: value for key, value in before.items() if key != "contract_block"})
    )
    anvil.deploy(swarm.settings)
    assert before["contract_block"] > BEFORE
    assert json.loads(file.read_text()) == before


@pytest.mark.parametrize("forgets_as_empty", [False, True])
def test_first_block_of_forgotten_state_is_not_guessed(
    swarm, old_chain, forgetful, caplog, forgets_as_empty
):
    newest = swarm.coordinator.block_number()
    with public(old_chain, pruned_before=newest - 5, forgets_as_empty=forgets_as_empty) as proxy:
        client = client_through(swarm, proxy.url)
        assert client.first_block() == 0
        assert "set chain.contract_block" in caplog.text
        assert len(list(client.events("RewardSubmitted"))) == 4


# ---- throttling


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7.0), ("0.5", 0.5), ("", None), ("soon", None), ("-3", -3.0)]
)
def test_retry_after_is_read(text, seconds):
    assert retry_after({"Retry-After": text} if text else {}) == seconds


def test_retry_after_is_read_as_a_date():
    from email.utils import formatdate

    assert 25 < (retry_after({"Retry-After": formatdate(time.time() + 30, usegmt=True)}) or 0) < 31


def test_address_that_throttles_rests_as_long_as_it_asks(swarm, old_chain):
    with public(old_chain, throttle_after=5, retry_after=0.3) as proxy:
        client = client_through(swarm, proxy.url)
        client.check()
        for _ in range(30):
            assert client.current_round() == 2
        assert proxy.injected["429"] >= 3
        assert proxy.early == 0


def test_longer_rest_than_there_is_patience_is_an_outage_with_its_reason(swarm, old_chain):
    with public(old_chain, throttle_after=0, retry_after=30.0) as proxy:
        client = client_through(swarm, proxy.url, timeout_seconds=1.0)
        for _ in range(3):
            with pytest.raises(Throttled, match=r"throttles"):
                client.current_round()
        assert len(proxy.asked) == 1
        # The next address serves meanwhile.
        both = client_through(swarm, proxy.url, old_chain)
        assert both.current_round() == 2


def test_rest_that_there_is_time_for_is_waited_for_after_an_odd_answer_too(swarm, old_chain):
    with public(old_chain, throttle_after=2, retry_after=0.3, odd="html") as proxy:
        proxy.is_odd = lambda method, number: number == 1
        assert client_through(swarm, proxy.url).current_round() == 2
        assert (proxy.injected["html"], proxy.injected["429"] > 0) == (1, True)
        assert proxy.early == 0


def test_throttling_within_json_is_throttling_too(swarm, old_chain):
    with public(old_chain, odd="limit", is_odd=lambda method, number: number == 1) as proxy:
        client = client_through(swarm, proxy.url)
        began = time.monotonic()
        assert client.current_round() == 2
        assert time.monotonic() - began > 0.9
        assert proxy.injected["limit"] == 1

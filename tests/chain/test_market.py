"""The prediction market on a real chain, and 10,000 random games of its rule."""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from market_model import MIN_BET, ONE, Model

from tests.chain.hall import with_market
from worker.chain import contract, upgrade
from worker.chain.deployment import read_deployment, resolve
from worker.chain.embedded import anvil
from worker.chain.market import GameStatus, Market
from worker.errors import ContractRefused

UPSTREAM = json.loads((Path(__file__).parent / "PredictionMarket.abi.json").read_text())


def test_existing_abi_is_contained():
    def key(entry):
        arguments = [(each["type"], each.get("indexed")) for each in entry["inputs"]]
        outputs = [each["type"] for each in entry.get("outputs", [])]
        return entry["type"], entry["name"], arguments, outputs, entry.get("stateMutability")

    ours = [key(entry) for entry in contract.market_abi() if "name" in entry]
    upstream = UPSTREAM if isinstance(UPSTREAM, list) else UPSTREAM["abi"]
    wanted = [key(entry) for entry in upstream if entry["type"] != "constructor"]
    assert len(wanted) > 20
    assert [entry for entry in wanted if entry not in ours] == []


def test_ten_thousand_games_pay_out_what_was_put_in():
    """And a later bet on a choice never buys more shares for a token than an earlier one."""
    rng = random.Random(17)
    for _ in range(10_000):
        num_choices = rng.randint(2, 8)
        game, latest = Model(num_choices), {}
        for _ in range(rng.randint(1, 12)):
            choice, bet = rng.randrange(num_choices), int(MIN_BET * 10 ** rng.uniform(0, 8))
            shares = game.bet(f"peer-{rng.randrange(6)}", choice, bet)
            assert shares > 0
            if choice in latest:
                earlier_shares, earlier_bet = latest[choice]
                assert shares * earlier_bet <= earlier_shares * bet
            latest[choice] = shares, bet
        payouts = game.payouts(rng.randrange(num_choices))
        assert 0 <= game.pot - sum(payouts.values()) < max(1, len(payouts))


def test_contract_computes_as_the_model(hall):
    """A sample of random games on the chain: the same shares, prices and payouts to the unit."""
    rng = random.Random(3)
    for _ in range(4):
        num_choices, right = rng.randint(2, 5), 0
        game, salt = hall.open(2, num_choices, right)
        model, put = Model(num_choices), defaultdict(int)
        for round in range(2):
            for peer in hall.accounts:
                choice, bet = rng.randrange(num_choices), rng.randint(MIN_BET, 10 * ONE)
                shares = hall.market.read("choiceTokensOut", game, round, choice, bet)
                assert shares == model.shares_for(choice, bet)
                hall.bet(game, peer, round, choice, bet)
                model.bet(peer, choice, bet)
                assert hall.market.price(game, round, choice) == model.highest[choice]
                put[peer] += bet
            hall.send("incrementRound", game)
        hall.send("revealAnswer", game, right, salt)
        assert hall.market.read("totalBets", game) == sum(put.values()) == model.pot
        for peer, expected in model.payouts(right).items():
            assert hall.market.payout(game, peer) == (expected, False)
            if expected:
                assert hall.claim(game, peer) == expected


def test_worked_example_of_the_documentation(hall):
    """The figures in docs/prediction-market.md."""
    game, salt = hall.open(2, 2, 0)
    hall.bet(game, "anna", 0, 0, 20 * ONE)
    assert hall.probability(game, 0) == pytest.approx(0.616, abs=5e-4)
    hall.bet(game, "bert", 0, 1, 50 * ONE)
    hall.send("incrementRound", game)
    assert hall.probability(game, 0) == pytest.approx(0.359, abs=5e-4)
    hall.bet(game, "cleo", 1, 0, 20 * ONE)
    shares = [hall.market.shares_of(game, 0, peer) / ONE for peer in ("anna", "cleo")]
    assert shares == pytest.approx([26.72, 25.48], abs=5e-3)
    hall.send("incrementRound", game)
    hall.send("revealAnswer", game, 0, salt)
    paid = [hall.claim(game, peer) / ONE for peer in ("anna", "cleo")]
    assert paid == pytest.approx([46.07, 43.93], abs=5e-3)
    with pytest.raises(ContractRefused, match="NothingToClaim"):
        hall.claim(game, "bert")


# ---- deployment


def test_existing_deployment_gets_a_market_once(chain):
    file = chain.settings.keeper.state_dir / anvil.DEPLOYMENT_FILE
    assert read_deployment(file, chain.deployment.chain_id).market is None
    nonce = chain.coordinator.nonce(chain.owner.address)
    anvil.deploy(with_market(chain))
    first = read_deployment(file, chain.deployment.chain_id)
    anvil.deploy(with_market(chain))
    assert read_deployment(file, chain.deployment.chain_id) == first
    assert first.contract == chain.deployment.contract
    assert resolve(chain.settings.chain.model_copy(update={"rpc_url": None})).market == first.market
    assert chain.coordinator.nonce(chain.owner.address) == nonce
    market = Market(chain.coordinator, first.market)
    assert market.version == contract.carried_version("PredictionMarket")
    assert market.read("swarmCoordinator") == chain.deployment.contract


def test_market_is_upgraded_in_place_and_keeps_its_games(hall, monkeypatch):
    game, _ = hall.open(2, 2, 0)
    before = upgrade.implementation(hall.chain.coordinator, hall.market.address)
    carried = contract.artifact
    changed = {**carried("PredictionMarket"), "runtime_sha256": "00"}
    monkeypatch.setattr(
        contract, "artifact", lambda name: changed if name == "PredictionMarket" else carried(name)
    )
    anvil.deploy(with_market(hall.chain))
    after = upgrade.implementation(hall.chain.coordinator, hall.market.address)
    assert (before.digest, before.address) != (after.digest, after.address)
    assert before.address != after.address
    assert hall.market.game(game).status == GameStatus.OPEN

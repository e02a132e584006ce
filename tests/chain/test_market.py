"""The prediction market on a real chain, and 10,000 random games of its rule."""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from market_model import MIN_BET, ONE, Model

from tests.chain.hall import open_hall, with_market
from worker.chain import contract, upgrade
from worker.chain.deployment import read_deployment, resolve
from worker.chain.embedded import anvil
from worker.chain.market import GameStatus, Market
from worker.errors import ContractRefused

HERE = Path(__file__).parent
UPSTREAM = json.loads((HERE / "PredictionMarket.abi.json").read_text())
FIRST_RELEASE = json.loads((HERE / "releases/market-1.json").read_text())


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
    """No later bet buys more shares for a token, and no last bets win for every answer."""
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
        # At the last moment, with several peers: a bet on any of the choices, each.
        for choice in rng.sample(range(num_choices), rng.randint(1, num_choices)):
            game.bet("eve", choice, int(MIN_BET * 10 ** rng.uniform(0, 5)))
        profits = []
        for right in range(num_choices):
            payouts = game.payouts(right)
            assert 0 <= game.pot - sum(payouts.values()) < len(payouts)
            profits.append(payouts["eve"] - game.stakes["eve"])
        assert min(profits) <= 0


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
                assert hall.market.read("price", game, round, choice) == model.highest[choice]
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
    paid = [hall.claim(game, peer) / ONE for peer in ("anna", "bert", "cleo")]
    assert paid == pytest.approx([28.94, 32.85, 28.21], abs=5e-3)
    with pytest.raises(ContractRefused, match="AlreadyClaimed"):
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


def test_market_of_version_1_is_upgraded_and_its_games_keep_their_rule(chain, monkeypatch):
    """Games opened before an upgrade are paid by the old rule, later ones by the new rule."""
    carried = contract.artifact
    with monkeypatch.context() as patch:
        (release,) = (
            each
            for each in upgrade.releases("PredictionMarket")
            if each["version"] == FIRST_RELEASE["version"]
        )
        first = {**carried("PredictionMarket"), **release, **FIRST_RELEASE}
        patch.setattr(
            contract,
            "artifact",
            lambda name: first if name == "PredictionMarket" else carried(name),
        )
        hall = open_hall(chain)
    assert hall.market.version == "hivewright/1"
    games = {name: hall.open(1, 2, 0) for name in ("settled", "running", "nobody right")}
    for number, _ in games.values():
        hall.bet(number, "bert", 0, 1, 20 * ONE)
    for name in ("settled", "running"):
        hall.bet(games[name][0], "anna", 0, 0, 10 * ONE)
    settle(hall, *games["settled"])
    before = upgrade.implementation(chain.coordinator, hall.market.address)

    anvil.deploy(with_market(chain))
    after = upgrade.implementation(chain.coordinator, hall.market.address)
    assert before.address != after.address
    market = hall.market = Market(chain.coordinator, hall.market.address)
    assert market.version == contract.carried_version("PredictionMarket")
    for name in ("running", "nobody right"):
        assert market.game(games[name][0]).status == GameStatus.OPEN
        settle(hall, *games[name])
    new, salt = hall.open(1, 2, 0)
    hall.bet(new, "anna", 0, 0, 10 * ONE)
    hall.bet(new, "bert", 0, 1, 20 * ONE)
    settle(hall, new, salt)
    numbers = [number for number, _ in games.values()]
    paid = [
        [market.payout(number, peer)[0] / ONE for peer in ("anna", "bert")]
        for number in (*numbers, new)
    ]
    assert paid[:3] == [[30, 0], [30, 0], [0, 20]]
    assert paid[3] == pytest.approx([12.41, 17.59], abs=5e-3)


def settle(hall, game, salt):
    hall.send("incrementRound", game)
    hall.send("revealAnswer", game, 0, salt)

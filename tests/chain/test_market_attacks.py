"""Peers and judges that cheat, on a chain whose blocks a test mines by hand."""

import pytest

from tests.chain.desk import judging
from tests.chain.hall import Hall, open_hall
from tests.chain.own_chain import ask, own_chain, skip_seconds
from tests.chain.test_player import Fixed, playing, turn
from worker.chain.client import Call
from worker.chain.market import TOKEN, GameStatus
from worker.errors import ContractRefused

GAS = 1_000_000
DAY = 86_400


@pytest.fixture
def hall(place):
    """Open a market on a chain of its own."""
    with own_chain(place) as chain:
        yield open_hall(chain)


def in_one_block(hall: Hall, *calls: tuple[str, Call, int]) -> list[bool]:
    """Mine one block with these calls; return which succeeded.

    Each is a sender, a call and a gas price, which decides the order within the block.
    """
    client = hall.market.client
    ask(hall.chain, "evm_setAutomine", False)
    ask(hall.chain, "evm_setIntervalMining", 0)
    hashes = []
    for sender, call, price in calls:
        account = hall.judge if sender == "judge" else hall.accounts[sender]
        ask(hall.chain, "anvil_setBalance", account.address, hex(10**20))
        tx_hash, raw = client.sign(
            account, call, nonce=client.nonce(account.address), gas=GAS, gas_price_wei=price
        )
        client.send_raw(raw)
        hashes.append(tx_hash)
    ask(hall.chain, "evm_mine")
    ask(hall.chain, "evm_setAutomine", True)
    receipts = [client.receipt(tx_hash) for tx_hash in hashes]
    assert len({receipt.block for receipt in receipts}) == 1
    return [receipt.succeeded for receipt in receipts]


def guess(hall: Hall, game: int, peer: str, round: int, choice: int, tokens: int) -> Call:
    return hall.market.guess_answer(game, peer, round, choice, tokens * TOKEN)


def test_attacker_who_bets_at_the_last_moment_gets_no_better_price(hall):
    """Last in the block that ends the betting: allowed, and paid less for a token than the first.

    One that is behind the end of the last round is refused, and counts for nothing.
    """
    game, salt = hall.open(1, 2, 0)
    hall.bet(game, "anna", 0, 0, 20 * TOKEN)
    hall.bet(game, "cleo", 0, 1, 60 * TOKEN)  # makes the right choice look unlikely
    end = hall.market.call("incrementRound", game)
    done = in_one_block(hall, ("bert", guess(hall, game, "bert", 0, 0, 20), 9), ("judge", end, 5))
    assert done == [True, True]
    hall.send("revealAnswer", game, 0, salt)
    early, late = hall.claim(game, "anna"), hall.claim(game, "bert")
    assert early >= late
    assert early + late <= 100 * TOKEN

    game, _ = hall.open(1, 2, 0)
    end = hall.market.call("incrementRound", game)
    done = in_one_block(hall, ("bert", guess(hall, game, "bert", 0, 0, 20), 5), ("judge", end, 9))
    assert done == [False, True]
    assert hall.market.read("totalBets", game) == 0


def test_attacker_who_bets_dust_on_what_nobody_believes_in_does_not_take_the_pot(hall):
    """In the block that ends the betting, with a peer for each choice that nobody else bet on."""
    eves = ("eve-1", "eve-2", "eve-3")
    hall.accounts |= {name: hall.chain.new_account(name) for name in eves}
    game, salt = hall.open(1, 4, 2)
    for peer in ("anna", "bert", "cleo"):
        hall.bet(game, peer, 0, 0, 100 * TOKEN)
    dust = TOKEN // 1000
    bets = [
        (eve, hall.market.guess_answer(game, eve, 0, choice, dust), 9)
        for choice, eve in enumerate(eves, 1)
    ]
    done = in_one_block(hall, *bets, ("judge", hall.market.call("incrementRound", game), 5))
    assert done == [True] * 4
    hall.send("revealAnswer", game, 2, salt)
    paid = {peer: hall.claim(game, peer) for peer in hall.accounts}
    # At the opening price of 0.5 a token buys two shares of 100, of a pot of 300.
    assert sum(paid[eve] for eve in eves) < 9 * dust
    assert all(99 * TOKEN < paid[peer] < 100 * TOKEN for peer in ("anna", "bert", "cleo"))
    assert 0 <= 300 * TOKEN + 3 * dust - sum(paid.values()) < len(paid)


def test_attacker_who_front_runs_a_reveal_is_refused(hall):
    """The reveal is in the open pool with the answer in it; a bet that overtakes it is too late."""
    game, salt = hall.open(1, 2, 1)
    hall.bet(game, "anna", 0, 1, 10 * TOKEN)
    hall.send("incrementRound", game)
    reveal = hall.market.call("revealAnswer", game, 1, salt)
    done = in_one_block(
        hall, ("judge", reveal, 5), ("bert", guess(hall, game, "bert", 0, 1, 50), 9)
    )
    assert done == [True, False]
    assert hall.market.balance("bert") == 100 * TOKEN
    assert hall.claim(game, "anna") == 10 * TOKEN


def test_attacker_who_reveals_for_the_judge_is_refused(hall):
    """A peer that reads the answer in the pool gains nothing by sending it first."""
    game, salt = hall.open(1, 2, 1)
    hall.send("incrementRound", game)
    reveal = hall.market.call("revealAnswer", game, 1, salt)
    assert in_one_block(hall, ("bert", reveal, 9), ("judge", reveal, 5)) == [False, True]


def test_judge_that_never_reveals_and_one_that_lies_cost_nothing(hall, tmp_path):
    game, salt = hall.open(1, 2, 1)
    with judging() as desk, playing(hall, desk, tmp_path) as player:
        desk.say(game, 0, 1, "yes", "no")
        turn(player, Fixed(-1.0, -4.0))
        hall.send("incrementRound", game)
        desk.say(-1, -1, -1)
        player.step()
        for lie in ((0, salt), (1, salt + 1)):
            with pytest.raises(ContractRefused, match="InvalidReveal"):
                hall.send("revealAnswer", game, *lie)
        skip_seconds(hall.chain, DAY + 1)
        # Now it would like to settle the game, as its friends lost nothing by waiting.
        with pytest.raises(ContractRefused, match="DeadlinePassed"):
            hall.send("revealAnswer", game, 1, salt)
        player.step()
        player.step()
        assert player.status() == {"paid": 1}
    assert hall.market.game(game).status == GameStatus.CANCELLED
    assert hall.market.balance("anna") == 200 * TOKEN  # all of it, and the new day's

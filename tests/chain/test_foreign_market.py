"""A foreign client plays against our market and judge, and our player in a foreign market.

The foreign client knows the existing ABI and the existing judge's calls alone; the foreign market
and its judge are written from the same (foreign/ForeignMarket.sol).
"""

import json
import secrets
from pathlib import Path

import pytest
import requests
from account_service import eventually, serving_role
from eth_abi import encode
from eth_account import Account
from web3 import Web3

from tests.chain.desk import judging
from tests.chain.test_player import Fixed, playing, turn
from worker import settings
from worker.chain.client import Call
from worker.chain.embedded import anvil
from worker.chain.market import TOKEN, Market
from worker.judge.server import Service

ABI = json.loads((Path(__file__).parent / "PredictionMarket.abi.json").read_text())
PROBLEM = {"clues": ["one", "one two"], "choices": ["no", "yes", "perhaps"], "answer": 1}
ROUND_SECONDS = 1.5
SECONDS = 10


class ForeignClient:
    """A node of RL Swarm: web3, the ABI, and the judge's `/current_clue/`."""

    def __init__(self, rpc_url: str, market: str, judge_url: str, peer_id: str, key: bytes) -> None:
        self.web3 = Web3(Web3.HTTPProvider(rpc_url))
        self.contract = self.web3.eth.contract(address=market, abi=ABI)
        self.judge_url, self.peer_id = judge_url, peer_id
        self.account = Account.from_key(key)
        self.answered: set[tuple[int, int]] = set()

    def play(self) -> None:
        """Bet on "yes" once per clue, as existing nodes do."""
        clue = requests.get(f"{self.judge_url}/current_clue/", timeout=SECONDS).json()
        place = clue["game_id"], clue["clue_id"]
        if clue["game_id"] < 0 or place in self.answered:
            return
        balance = self.contract.functions.betTokenBalance(self.peer_id).call()
        bet = balance // max(1, clue["rounds_remaining"])
        choice = clue["choices"].index("yes")
        self.send("guessAnswer", *(clue["game_id"], self.peer_id, clue["clue_id"], choice, bet))
        self.answered.add(place)

    def send(self, name: str, *arguments: object) -> None:
        function = self.contract.functions[name](*arguments)
        options = {
            "from": self.account.address,
            "nonce": self.web3.eth.get_transaction_count(self.account.address),
            "gasPrice": 0,
        }
        signed = self.account.sign_transaction(function.build_transaction(options))
        tx_hash = self.web3.eth.send_raw_transaction(signed.raw_transaction)
        receipt = self.web3.eth.wait_for_transaction_receipt(tx_hash, SECONDS)
        assert receipt["status"] == 1, name


@pytest.mark.timeout(90)
def test_foreign_client_plays_in_our_market_with_our_judge(hall, rpc_url, tmp_path):
    keeper = hall.chain.settings.keeper.state_dir
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    raw = {
        "chain": {"deployment_file": str(keeper / anvil.DEPLOYMENT_FILE), "poll_seconds": 0.05},
        "judge": {
            "state_dir": str(tmp_path / "judge"),
            "key_file": str(keeper / anvil.JUDGE_KEY_FILE),
            "problems_file": str(tmp_path / "problems.jsonl"),
            "round_seconds": ROUND_SECONDS,
            "pause_seconds": 0.0,
            "max_games": 1,
        },
    }
    with serving_role(Service(settings.parse(raw, "test"))) as judge_url:
        key = hall.accounts["anna"].key
        client = ForeignClient(rpc_url, hall.market.address, judge_url, "anna", key)

        def is_settled() -> bool:
            client.play()
            return bool(requests.get(f"{judge_url}/api/games", timeout=SECONDS).json()["games"])

        eventually(is_settled)
        assert (0, 0) in client.answered
        client.send("claimReward", 0, "anna")
        assert client.contract.functions.betTokenBalance("anna").call() == 100 * TOKEN
        (claimed,) = client.contract.events.RewardClaimed().get_logs(from_block=0)
        assert claimed["args"]["betTokensOut"] == client.contract.functions.totalBets(0).call()


@pytest.mark.timeout(90)
def test_our_player_plays_in_a_foreign_market_with_a_foreign_judge(
    hall, foreign_market_build, tmp_path
):
    chain = hall.chain
    judge = Account.create()
    code = bytes.fromhex(foreign_market_build["bytecode"][2:])
    code += encode(["address", "address"], [chain.deployment.contract, judge.address])
    address = chain.send(chain.owner, Call("create", code, None)).contract
    market = Market(chain.coordinator, address)
    assert market.version is None
    hall.market = market
    hall.judge = judge
    with judging() as desk, playing(hall, desk, tmp_path) as player:
        for game, right in ((0, 1), (1, 0)):
            salt = secrets.randbits(256)
            root = Web3.keccak(encode(["uint256", "uint256"], [right, salt]))
            hall.send("createNewGame", 2, 2, root)
            for round, remaining in ((0, 2), (1, 1)):
                hall.bet(game, "bert", round, 0, TOKEN)
                desk.say(game, round, remaining, "no", "yes")
                turn(player, Fixed(-9.0, -0.1))
                player.step()
                hall.send("incrementRound", game)
            desk.say(-1, -1, -1)
            hall.send("revealAnswer", game, right, salt)
            for _ in range(3):
                player.step()
            if right == 1:
                assert market.balance("anna") == 102 * TOKEN
                assert player.status()["paid"] == 2
        assert player.status() == {
            "paid": 2,
            "lost": 2,
            "rated": 4,
            "brier": pytest.approx(1.0, abs=0.01),
        }
    claims = list(market.events("RewardClaimed", {}, 0))
    assert [(each.arguments["peerId"], each.arguments["betTokensOut"]) for each in claims] == [
        ("anna", 102 * TOKEN)
    ]

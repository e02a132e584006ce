"""A prediction market on a real chain, with its judge and some peers."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from eth_account.signers.local import LocalAccount

from worker import settings
from worker.chain.deployment import read_deployment
from worker.chain.embedded import anvil
from worker.chain.market import TOKEN, Market, commitment


@dataclass
class Hall:
    """A market on a chain, its judge, and peers with their accounts."""

    chain: Any
    market: Market
    judge: LocalAccount
    accounts: dict[str, LocalAccount] = field(default_factory=dict)

    def open(self, num_rounds: int, num_choices: int, right: int) -> tuple[int, int]:
        """Open a game; return its number and the secret of its commitment."""
        salt = secrets.randbits(256)
        self.send("createNewGame", num_rounds, num_choices, commitment(right, salt))
        return self.market.num_games() - 1, salt

    def send(self, name: str, *arguments: object) -> None:
        self.chain.send(self.judge, self.market.call(name, *arguments))

    def bet(self, game: int, peer: str, round: int, choice: int, bet: int) -> None:
        call = self.market.guess_answer(game, peer, round, choice, bet)
        self.chain.send(self.accounts[peer], call)

    def probability(self, game: int, choice: int) -> float:
        """Return the market's belief that the choice is right."""
        return self.market.read("impliedProbability", game, choice) / TOKEN

    def claim(self, game: int, peer: str) -> int:
        """Return the units by which the balance rose."""
        before = self.market.balance(peer)
        self.chain.send(self.accounts[peer], self.market.claim_reward(game, peer))
        return self.market.balance(peer) - before


def with_market(chain: Any) -> settings.Settings:
    """Return the chain's settings with a market wanted."""
    wanted = chain.settings.market.model_copy(update={"enabled": True})
    return chain.settings.model_copy(update={"market": wanted})


def open_hall(chain: Any) -> Hall:
    deployment = anvil.deploy(with_market(chain))
    file = chain.settings.keeper.state_dir / anvil.DEPLOYMENT_FILE
    address = read_deployment(file, deployment.chain_id).market
    judge = anvil.load_key(file.with_name(anvil.JUDGE_KEY_FILE), "judge")
    found = Hall(chain, Market(chain.coordinator, address), judge)
    for name in ("anna", "bert", "cleo"):
        found.accounts[name] = chain.new_account(name)
    return found

"""A node's bets without the rest of the node, as a process that a test may kill.

usage: player_process.py SETTINGS KEY FOLDER    bets for the peer "anna"; FOLDER/up is made then
"""

import sys
import time
from pathlib import Path
from typing import Any

from eth_account import Account

from worker import settings
from worker.chain.coordinator import Coordinator
from worker.chain.market import Market
from worker.chain.transaction_queue import Sender
from worker.errors import WorkerError
from worker.market import player
from worker.market.journal import Journal

POLL_SECONDS = 0.1


class OwnAccount:
    """Sends for one account, as the account service does for a node."""

    def __init__(self, client: Coordinator, key: str, folder: Path) -> None:
        self.sender = Sender(client, Account.from_key(key), folder / "transactions.db")

    def guess_answer(self, market: Market, *arguments: Any) -> str:
        return self.sender.send(market.guess_answer(*arguments))

    def claim_reward(self, market: Market, game: int, peer_id: str) -> str:
        return self.sender.send(market.claim_reward(game, peer_id))


class Second:
    """A model that believes in the second choice."""

    def logprobs(self, clue: str, choices: tuple[str, ...], seconds: float) -> list[float]:
        return [-1.0 if place == 1 else -3.0 for place in range(len(choices))]


def main() -> None:
    file, key, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    player.RESEND_SECONDS = 1.0
    parsed = settings.load(file)
    client = Coordinator(parsed.chain)
    account = OwnAccount(client, key, folder)
    journal = Journal(folder / "bets.db")
    playing = player.Player(
        parsed.market, "anna", client, account, journal, folder / "prg_record.txt"
    )
    playing.start()
    (folder / "up").touch()
    while True:
        playing.think(Second)
        try:
            account.sender.tend()
        except WorkerError as error:  # the chain is away
            sys.stderr.write(f"{error}\n")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()

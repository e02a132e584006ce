"""kill -9 of chain, judge and player at once, as in a power failure, in the middle of a game.

No game may be stuck, and each bet and each claim is made exactly once. The nightly form, in a whole
swarm and with one process killed at a time, is tests/e2e/test_market_kills.py.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from eth_account import Account

from tests.chain.desk import waited
from worker import settings
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.market import GameStatus, Market
from worker.market.journal import Journal

SECONDS = 90.0
"""Limit for each wait on a busy machine; alone the whole test takes half a minute."""


class House:
    """The processes of one host, with a settings file for all, and the ports that they keep."""

    def __init__(self, place: settings.Settings, folder: Path) -> None:
        self.folder = folder
        self.key = Account.create().key.hex()
        self.processes: list[subprocess.Popen[bytes]] = []
        problems = [
            {"clues": [f"{i}", f"{i}?"], "choices": ["no", "yes"], "answer": 1} for i in "ab"
        ]
        (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
        chain_port, judge_port = anvil.free_port("127.0.0.1"), anvil.free_port("127.0.0.1")
        raw = place.model_dump(mode="json", exclude_defaults=True)
        raw["anvil"]["port"] = chain_port
        raw["chain"] |= {"rpc_url": f"http://127.0.0.1:{chain_port}", "poll_seconds": 0.1}
        raw["market"] = {
            "enabled": True,
            "judge_url": f"http://127.0.0.1:{judge_port}",
            "poll_seconds": 0.1,
        }
        raw["judge"] = {
            "port": judge_port,
            "state_dir": str(folder / "judge"),
            "key_file": str(folder / "host" / anvil.JUDGE_KEY_FILE),
            "problems_file": str(folder / "problems.jsonl"),
            "round_seconds": 4.0,
            "pause_seconds": 0.0,
        }
        raw["environment"] = {"families": [{"name": "code/numbers"}]}  # the quickest to load
        self.settings = settings.parse(raw, "test")
        self.file = folder / "house.yaml"
        self.file.write_text(settings.dump(self.settings))

    def start(self, *words: object) -> None:
        with (self.folder / "log.txt").open("a") as log:
            command = [sys.executable, *map(str, words)]
            self.processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def start_chain(self) -> None:
        address = self.settings.anvil.state_file.with_name("address")
        address.unlink(missing_ok=True)
        self.start("-m", "worker", "chain", "up", "--settings", self.file)
        waited(address.exists, SECONDS)

    def start_others(self) -> None:
        """Start the player first, so that it is there for the judge's first clue."""
        is_up = self.folder / "player/up"
        is_up.unlink(missing_ok=True)
        script = Path(__file__).with_name("player_process.py")
        self.start(script, self.file, self.key, self.folder / "player")
        waited(is_up.exists, SECONDS)
        self.start("-m", "worker", "judge", "--settings", self.file)

    def cut_power(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(30)
        self.processes.clear()


@pytest.fixture
def house(place, tmp_path) -> Iterator[House]:
    made = House(place, tmp_path)
    yield made
    made.cut_power()


def test_power_failure_leaves_no_stuck_game_and_pays_once(house):
    house.start_chain()
    anvil.deploy(house.settings)
    client = Coordinator(house.settings.chain)
    client.check()
    client.transact(Account.from_key(house.key), client.register_peer("anna"), SECONDS)
    market = Market(client, client.deployment.market)
    house.start_others()
    waited(lambda: list(market.events("NewGuess", {}, 0)), SECONDS)

    house.cut_power()
    house.start_chain()
    house.start_others()
    journal = Journal(house.folder / "player/bets.db")

    log = house.folder / "log.txt"
    waited(lambda: "no more games" in log.read_text() and not journal.num_open(), SECONDS)
    numbers = range(market.num_games())
    assert {market.game(number).status for number in numbers} == {GameStatus.SETTLED}
    bets = [
        (event.arguments["gameIdx"], event.arguments["roundIdx"])
        for event in market.events("NewGuess", {}, 0)
    ]
    rows = journal._database.execute("SELECT game, round FROM bets WHERE state = 'paid'")
    assert sorted(rows) == sorted(bets) != []
    claims = [event.arguments["gameIdx"] for event in market.events("RewardClaimed", {}, 0)]
    assert sorted(claims) == sorted({game for game, _ in bets})

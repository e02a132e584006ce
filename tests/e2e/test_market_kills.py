"""kill -9 of the judge, of a worker and of the chain, as the processes that they are.

No game may be stuck, and each bet and each claim is made exactly once.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from worker import settings
from worker.chain.coordinator import Coordinator
from worker.chain.market import TOKEN, GameStatus, Market
from worker.commands.demo import Demo
from worker.commands.demo_processes import Children
from worker.errors import ChainError
from worker.market.journal import Journal
from worker.runtime.state_dir import StateDir

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

WORKER = "worker-0"
PATIENCE_SECONDS = 240.0


class Swarm:
    """The demo's processes, which may be killed and started again with their own settings."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self.children = folder, children
        self.journal = Journal(StateDir(folder / WORKER).bets)
        client = Coordinator(settings.load(folder / "settings/dashboard.yaml").chain)
        client.check()
        assert client.deployment.market is not None
        self.market = Market(client, client.deployment.market)
        (self.peer_id,) = set(self._registered(client))

    def _registered(self, client: Coordinator) -> list[str]:
        return [event.arguments["peerId"] for event in client.events("PeerRegistered")]

    def kill(self, name: str) -> None:
        process = self.children.by_name[name].process
        process.kill()
        process.wait(30)

    def start(self, command: str, name: str) -> None:
        file = self.folder / "settings" / f"{name}.yaml"
        self.children.start(command, file, name, ends=command == "worker")

    def kill_anvil(self) -> None:
        """Kill the node under the chain's process, which then ends, too."""
        chain = self.children.by_name["chain"].process
        for child in children_of(chain.pid):
            os.kill(child, signal.SIGKILL)
        chain.wait(30)

    def eventually(self, condition: Callable[[], object], what: str) -> None:
        """Wait until the condition is true; the chain may be away meanwhile."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if condition():
                    return
            except ChainError:
                pass
            assert time.monotonic() < deadline, f"not in time: {what}"
            time.sleep(0.1)

    def wait_for_bet(self) -> int:
        """Return a game in progress that the worker has just bet in."""
        before = {(row.game, row.round) for row in self.journal.open_rows(self.market.address)}
        found: list[int] = []

        def is_there() -> bool:
            rows = self.journal.open_rows(self.market.address)
            found[:] = [row.game for row in rows if (row.game, row.round) not in before]
            return bool(found)

        self.eventually(is_there, "a bet")
        return found[-1]

    def is_over(self, game: int) -> bool:
        return self.market.game(game).status in (GameStatus.SETTLED, GameStatus.CANCELLED)

    def open_games(self) -> set[int]:
        """Return the games that the worker has a bet on its way in."""
        return {row.game for row in self.journal.open_rows(self.market.address)}


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("market") / "out"
    folder.mkdir()
    demo = Demo(folder, 1, 99_000, 1, Console(), has_market=True)
    with Children(folder / "logs") as children:
        demo.start(children)
        yield Swarm(folder, children)


def require_once(swarm: Swarm, last_game: int) -> None:
    """Compare the worker's journal with the chain, up to `last_game`."""
    market = swarm.market
    for game in range(last_game + 1):
        swarm.eventually(lambda game=game: swarm.is_over(game), f"game {game} is over")
    swarm.eventually(
        lambda: not {game for game in swarm.open_games() if game <= last_game}, "all is claimed"
    )
    bets = [
        (event.arguments["gameIdx"], event.arguments["roundIdx"], event.arguments["bet"])
        for event in market.events("NewGuess", {}, 0)
        if event.arguments["gameIdx"] <= last_game
    ]
    assert len({bet[:2] for bet in bets}) == len(bets) > 0
    rows = swarm.journal._database.execute(
        "SELECT game, round, amount FROM bets WHERE state IN ('paid', 'lost') AND game <= ?",
        (last_game,),
    )
    assert sorted(bets) == sorted((game, round, int(amount)) for game, round, amount in rows)
    claims = Counter(
        event.arguments["gameIdx"]
        for event in market.events("RewardClaimed", {}, 0)
        if event.arguments["gameIdx"] <= last_game
    )
    assert set(claims.values()) <= {1}
    for game in {game for game, _, _ in bets}:
        payout, is_claimed = market.payout(game, swarm.peer_id)
        assert (is_claimed, claims[game]) == ((True, 1) if payout else (False, 0))


def test_killed_judge_continues_its_game(swarm: Swarm) -> None:
    game = swarm.wait_for_bet()
    swarm.kill("judge")
    time.sleep(1)
    swarm.start("judge", "judge")
    require_once(swarm, game)
    assert swarm.market.game(game).status == GameStatus.SETTLED


def test_killed_worker_bets_and_claims_once(swarm: Swarm) -> None:
    game = swarm.wait_for_bet()
    swarm.kill(WORKER)
    swarm.start("worker", WORKER)
    require_once(swarm, game)
    # And once more while the game waits for its claim.
    game = swarm.wait_for_bet()
    swarm.eventually(lambda: swarm.is_over(game), "the game is over")
    swarm.kill(WORKER)
    swarm.start("worker", WORKER)
    require_once(swarm, game)


def test_killed_chain_leaves_no_stuck_game(swarm: Swarm) -> None:
    """It may lose its last second, and with it a bet or a game; the journal says so."""
    for kill in (swarm.kill_anvil, lambda: swarm.kill("chain")):
        game = swarm.wait_for_bet()
        kill()
        swarm.start("chain up", "chain")
        swarm.eventually(lambda: swarm.market.num_games() > 0, "the chain is back")
        last = max(game, swarm.market.num_games() - 1)
        swarm.eventually(lambda last=last: swarm.market.num_games() > last, f"game {last}")
        require_once(swarm, last)
    later = swarm.wait_for_bet()
    require_once(swarm, later)
    assert swarm.market.balance(swarm.peer_id) <= 100 * TOKEN


def test_all_processes_run_after_the_kills(swarm: Swarm) -> None:
    swarm.children.require_healthy()

"""The dashboard's page about the prediction market, in a real browser, of a real chain."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, expect

from tests.chain.conftest import Chain
from tests.chain.desk import Desk, judging
from tests.chain.hall import Hall, open_hall
from tests.pages.accessibility import barriers
from tests.pages.browser import Tab
from tests.pages.dashboards import Dashboard, showing, with_dashboard
from worker.chain.market import TOKEN
from worker.market_view.market_history import MAX_GAMES, History
from worker.swarm.identity import animal_name

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

HOSTILE = "<img/src=x onerror='document.title=1'>\u202e"
QUESTION = "What is 2 + 3?\nGive a number."
WIDTHS = (360, 800, 1280)


@dataclass
class Shown:
    """A dashboard that shows a market with the games of `played`."""

    hall: Hall
    desk: Desk
    dashboard: Dashboard

    def said(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.dashboard.url}/api/market", timeout=10).json())

    def says(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Return what it says as soon as the condition is true."""
        deadline = time.monotonic() + 30
        while not condition(said := self.said()):
            assert time.monotonic() < deadline, json.dumps(said, indent=1)
            time.sleep(0.05)
        return said


def played(hall: Hall, desk: Desk) -> None:
    """Play a game to its end, and another one up to its second round."""
    game, salt = hall.open(2, 2, 0)
    hall.bet(game, "anna", 0, 0, 20 * TOKEN)
    hall.bet(game, "bert", 0, 1, 50 * TOKEN)
    hall.send("incrementRound", game)
    hall.bet(game, "cleo", 1, 0, 20 * TOKEN)
    hall.send("incrementRound", game)
    hall.send("revealAnswer", game, 0, salt)
    hall.claim(game, "anna")
    second, _ = hall.open(3, 3, 0)
    hall.bet(second, "anna", 0, 2, 10 * TOKEN)
    hall.send("incrementRound", second)
    past = {"game": game, "clues": ["What", QUESTION], "choices": ["5", "7"], "family": "sums"}
    desk.past = json.dumps({"games": [past]}).encode()
    desk.say(second, 1, 2, "cat", "dog", HOSTILE)


@pytest.fixture
def shown(chain: Chain, tmp_path: Path) -> Iterator[Shown]:
    hall = open_hall(chain)
    with judging() as desk:
        played(hall, desk)
        place = {"contract": hall.market.address, "judge_url": desk.url}
        of = with_dashboard(chain.settings, tmp_path / "dashboard")
        of = of.model_copy(update={"market": of.market.model_copy(update=place)})
        with showing(of) as dashboard:
            found = Shown(hall, desk, dashboard)
            found.says(lambda said: len(said["games"]) == 2 and said["judge_at"])
            yield found


def test_market_is_told_as_the_chain_has_it(shown: Shown) -> None:
    second, first = shown.said()["games"]
    assert (first["state"], first["right_choice"], first["pot"]) == ("settled", 0, 90.0)
    assert (first["question"], first["choices"], first["family"]) == (QUESTION, ["5", "7"], "sums")
    bets = [(bet["peer_id"], bet["round"], bet["amount"], bet["result"]) for bet in first["bets"]]
    assert bets == [
        ("anna", 0, 20.0, "won"),
        ("bert", 0, 50.0, "lost 34 %"),
        ("cleo", 1, 20.0, "won"),
    ]
    assert [belief[0] for _, belief in first["beliefs"]] == pytest.approx(
        [0.5, 0.616, 0.359, 0.447], abs=5e-4
    )
    hall = shown.hall
    assert first["beliefs"][-1][1][0] == pytest.approx(hall.probability(0, 0), abs=1e-9)
    assert second["beliefs"][-1][1][2] == pytest.approx(hall.probability(1, 2), abs=1e-9)
    assert (second["state"], second["num_rounds"], len(second["round_ends"])) == ("open", 3, 1)
    rows = {row["peer_id"]: row for row in shown.said()["standings"]}
    assert rows["anna"]["paid"] == pytest.approx(28.94, abs=5e-3)
    for peer, row in rows.items():
        assert row["balance"] == pytest.approx(hall.market.balance(peer) / TOKEN)


def test_page_is_read_without_javascript(shown: Shown, tab: Tab) -> None:
    browser = tab.page.context.browser
    assert isinstance(browser, Browser)
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(f"{shown.dashboard.url}/market")
    expect(page.locator(".game")).to_have_count(2)
    first = page.locator("#game-0")
    expect(first.locator("polyline.price")).to_have_count(2)
    expect(first.locator(".key .right")).to_contain_text("5 45 %, the right answer")
    expect(first.locator("tbody tr")).to_have_count(3)
    expect(first.locator("tbody")).to_contain_text(animal_name("cleo"))
    expect(first).to_contain_text("90.00 tokens, 28.94 claimed; sums")
    expect(page.locator("#game-1 .question")).to_contain_text("which?")
    expect(page.locator(".bets tbody tr")).to_have_count(3)
    expect(page.locator(".muted").first).to_contain_text("UTC; questions as of 20")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_has_no_barriers(shown: Shown, tab: Tab, scheme: str) -> None:
    tab.page.emulate_media(color_scheme=scheme)
    for width in WIDTHS:
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.goto(f"{shown.dashboard.url}/market")
        tab.expect_count(".game", 2)
        tab.expect_no_scrolling_sideways(width)
        assert barriers(tab.page) == []


def test_words_of_a_judge_never_become_markup(shown: Shown, tab: Tab) -> None:
    tab.page.goto(f"{shown.dashboard.url}/market")
    key = tab.page.locator("#game-1 .key")
    expect(key).to_contain_text(HOSTILE.removesuffix("\u202e") + "\\u202e")
    assert tab.page.locator("main img").count() == 0
    # Words for another number of choices are not of this game.
    shown.desk.say(1, 1, 2, "only", "two")
    time.sleep(6)
    assert shown.said()["games"][0]["choices"] == ["cat", "dog", HOSTILE]


def test_page_renews_itself_and_keeps_what_is_open(shown: Shown, tab: Tab) -> None:
    tab.page.goto(f"{shown.dashboard.url}/market")
    tab.page.locator("#game-0 summary").click()
    expect(tab.page.locator("#game-0 .question")).to_be_visible()
    tab.page.mouse.click(2, 2)
    tab.page.evaluate("document.activeElement.blur()")
    shown.hall.bet(1, "bert", 1, 0, 5 * TOKEN)
    expect(tab.page.locator("#game-1 tbody tr")).to_have_count(2)
    expect(tab.page.locator("#game-0 .question")).to_be_visible()


def test_judge_that_is_away_leaves_what_is_known(shown: Shown, tab: Tab) -> None:
    shown.desk.status = 503
    shown.hall.open(1, 2, 0)
    said = shown.says(lambda said: said["judge_error"])
    assert "HTTP 503" in said["judge_error"]
    assert said["error"] is None
    tab.page.goto(f"{shown.dashboard.url}/market")
    expect(tab.page.locator("#market")).to_contain_text("the judge can't be read: ")
    expect(tab.page.locator("#game-0 .key")).to_contain_text("5")


def test_swarm_without_a_market_says_so(dashboard: Dashboard, tab: Tab) -> None:
    tab.page.goto(dashboard.url)
    tab.page.get_by_role("link", name="Market").click()
    expect(tab.page.locator("#market")).to_contain_text("This swarm has no prediction market.")
    assert barriers(tab.page) == []


def test_old_games_are_forgotten_and_a_new_chain_is_read_again(chain: Chain) -> None:
    hall = open_hall(chain)
    of = chain.settings
    place = {"contract": hall.market.address}
    of = of.model_copy(update={"market": of.market.model_copy(update=place)})
    history = History(of, lambda: chain.coordinator)
    for _ in range(MAX_GAMES + 2):
        hall.open(1, 2, 0)
    history.look()
    numbers = [game.number for game in history.view().games]
    assert numbers == list(range(MAX_GAMES + 1, 1, -1))
    # Another hash of the last block: all is read again.
    history._log.newest = (history._log.newest[0], "0x" + "00" * 32)
    history._log.games[2].bets.append(None)
    history.look()
    assert [len(game.bets) for game in history.view().games] == [0] * MAX_GAMES

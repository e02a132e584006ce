"""The account page about the prediction market: a person's own nodes, and nobody else's."""

import re

import pytest
from account_service import serving

from tests.account.people import ADA, signed_in
from tests.account.test_account_browser import (
    HOST,
    require_accessible,
    sign_in,
    url,
)
from tests.account.visitor import Visitor, texts
from tests.chain.hall import Hall, open_hall
from worker.chain.market import TOKEN
from worker.swarm.identity import animal_name

__all__ = ["url"]


@pytest.fixture
def hall(chain) -> Hall:
    return open_hall(chain)


@pytest.fixture
def service(hall, host):
    """Serve accounts for a swarm with a market, in which anna is the operator's node."""
    place = {"contract": hall.market.address}
    with_market = host.model_copy(update={"market": host.market.model_copy(update=place)})
    with serving(with_market) as running:
        accounts = running.service.accounts
        accounts.link(accounts.operator, "anna", "my node")
        yield running


def play(hall: Hall) -> None:
    game, salt = hall.open(1, 2, 0)
    hall.bet(game, "anna", 0, 0, 20 * TOKEN)
    hall.bet(game, "bert", 0, 1, 30 * TOKEN)
    hall.send("incrementRound", game)
    hall.send("revealAnswer", game, 0, salt)
    hall.claim(game, "anna")
    other, _ = hall.open(1, 2, 0)
    hall.bet(other, "bert", 0, 1, 30 * TOKEN)


def test_own_nodes_bets_results_and_balances_are_shown(service, hall) -> None:
    play(hall)
    answer = signed_in(service, HOST).get("/market")
    assert answer.status_code == 200
    text = texts(answer)
    assert "my node 106.32 1 1 0 20.00 26.32" in text
    assert "Game 0 settled" in text
    assert "my node 0 choice 1 20.00" in text
    assert answer.text.count("<polyline") == 2
    # Neither bets nor games of others.
    assert animal_name("bert") not in text
    assert "Game 1" not in text
    assert re.search(r"as of 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", text)


def test_somebody_else_sees_nothing_of_it(service, hall) -> None:
    play(hall)
    service.service.accounts.create(ADA, 3)
    text = texts(signed_in(service, ADA).get("/market"))
    assert "No node is linked to this account." in text
    assert "my node" not in text
    assert "Game 0" not in text
    gone = Visitor(service.url).get("/market", follow=False)
    assert (gone.status_code, gone.headers.get("Location")) == (303, "/sign-in"), gone.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible_and_fits(service, hall, url, tab, scheme) -> None:
    play(hall)
    tab.page.emulate_media(color_scheme=scheme)
    sign_in(service, url, tab, HOST)
    for width in (360, 800, 1280):
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.goto(url + "/market")
        require_accessible(tab)
        tab.expect_no_scrolling_sideways(width)

"""The node says at its start whether it takes part in the prediction market."""

import logging
from types import SimpleNamespace

import pytest

from tests.market.small_market import ADDRESS
from worker import settings
from worker.errors import ChainUnreachable
from worker.market.bets import Bets
from worker.market.journal import Journal
from worker.market.player import Player


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def make_player(tmp_path, in_deployment: str | None, **section: object) -> Player:
    client = SimpleNamespace(deployment=SimpleNamespace(market=in_deployment))
    journal = Journal(tmp_path / "bets.db")
    return Player(settings.Market(**section), "anna", client, None, journal, tmp_path / "record")


def test_node_that_takes_part_says_where_and_how_to_opt_out(tmp_path, said):
    player = make_player(tmp_path, ADDRESS, judge_url="http://127.0.0.1:1", policy="kelly")
    assert player._find()
    assert player._find()
    (line,) = said.messages
    assert line.startswith("taking part in the prediction market")
    for part in (ADDRESS, "judge=http://127.0.0.1:1", "policy=kelly", "market.enabled: false"):
        assert part in line


def test_results_are_doubted_once_after_an_outage(tmp_path, said, monkeypatch):
    player = make_player(tmp_path, ADDRESS, judge_url="http://127.0.0.1:1")
    doubts, errors = [], [ChainUnreachable("still none"), ChainUnreachable("no answer")]
    monkeypatch.setattr(Bets, "doubt", lambda bets: doubts.append(bets))

    def step() -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(player, "step", step)
    for num_doubts in (0, 0, 1, 1):
        player._try_step()
        assert len(doubts) == num_doubts
    assert [line for line in said.messages if "waits" in line or "again" in line] == [
        "prediction market waits error=no answer",
        "prediction market answers again",
    ]


@pytest.mark.parametrize(("contract", "judge_url"), [(None, "http://127.0.0.1:1"), (ADDRESS, None)])
def test_node_of_a_swarm_without_a_market_says_so_once(tmp_path, said, contract, judge_url):
    player = make_player(tmp_path, contract, judge_url=judge_url)
    player._closing.set()  # it does not wait for a market
    assert not player._find()
    assert not player._find()
    assert said.messages == ["prediction market: this swarm has none"]

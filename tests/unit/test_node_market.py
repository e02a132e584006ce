"""The round loop with the prediction market: the model is asked between rounds, within limits."""

import logging

import pytest
import torch

from tests.unit.test_node import enrolled, half_are_right, make_node, places, with_chain
from worker import settings
from worker.environments.mixture import Mix
from worker.market.journal import Journal, Row
from worker.market.judge_client import Clue
from worker.market.player import Player
from worker.node import Node
from worker.policy.choices import ChoiceScorer

CLUE = Clue(game_id=3, clue_id=0, rounds_remaining=1, clue="1 + 1 = ?", choices=["2", "30"])
ROW = Row("0x" + "a" * 40, 3, 0, 9, 0, 0, (), "skipped", 1.0, "the worker ended")


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node whose tasks have a signal, with two rounds to train."""
    monkeypatch.setattr(Mix, "score", half_are_right)
    made = make_node(enrolled(tmp_path, node_max_rounds=2, generation_max_completion_length=32))
    yield made
    made.close()


def ask(node: Node, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Player:
    """Give the node a player that has read a clue, and whose thread does nothing."""
    monkeypatch.setattr(Player, "start", lambda _: None)
    journal = Journal(node.files.bets)
    section = settings.Market(**changes)
    player = Player(section, node.peer_id, None, None, journal, node.files.market_record)
    player._asked = CLUE, ROW
    node.player = player
    return player


def test_model_is_asked_once_between_rounds(node, monkeypatch):
    player = ask(node, monkeypatch)
    scored = []
    logprobs = ChoiceScorer.logprobs
    monkeypatch.setattr(
        ChoiceScorer,
        "logprobs",
        lambda self, *asked: scored.append(asked) or logprobs(self, *asked),
    )
    node.train()
    clue, row = player._opinion
    assert clue is CLUE
    assert len(row.beliefs) == 2
    assert sum(row.beliefs) == pytest.approx(1.0)
    assert row.reason is None
    assert scored == [(CLUE.clue, CLUE.choices, settings.Market().seconds_per_round)]
    assert places(node.folder) == [(0, 0), (1, 0)]


def test_model_is_asked_while_the_node_waits_for_a_round(tmp_path, monkeypatch):
    monkeypatch.setattr(Mix, "score", half_are_right)
    checked = enrolled(tmp_path, node_max_rounds=2, node_max_parts_per_round=1)
    node = with_chain(make_node(checked), 4, 1)
    thoughts = []
    player = ask(node, monkeypatch)
    monkeypatch.setattr(player, "think", lambda _: thoughts.append(node.last.round))
    node.train()
    node.close()
    assert thoughts == [-1, 0, 0, 0, 0]


@pytest.mark.parametrize("enabled", [False, None])
def test_node_that_opts_out_says_so_at_its_start(tmp_path, caplog, enabled):
    caplog.set_level(logging.INFO)
    made = make_node(enrolled(tmp_path, market_enabled=enabled))
    made.close()
    assert made.player is None
    said = "not taking part in the prediction market: market.enabled is false"
    assert (said in caplog.text) == (enabled is False)


def test_pass_beyond_its_seconds_is_not_made(node, monkeypatch):
    player = ask(node, monkeypatch, seconds_per_round=1e-9)
    node.train()
    (_, row) = player._opinion
    assert row.beliefs == ()
    assert row.reason.startswith("the model would need")
    assert places(node.folder) == [(0, 0), (1, 0)]


def test_pass_beyond_the_memory_does_not_end_the_node(node, monkeypatch):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ChoiceScorer, "_run", fail)
    player = ask(node, monkeypatch)
    node.train()
    (_, row) = player._opinion
    assert "CUDA out of memory" in row.reason
    assert places(node.folder) == [(0, 0), (1, 0)]


def test_clue_has_a_row_before_a_fault_of_the_gpu_ends_the_node(node, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(ChoiceScorer, "_run", fail)
    player = ask(node, monkeypatch)
    with pytest.raises(RuntimeError, match="launch failure"):
        node.train()
    assert player.journal.has(ROW.market, CLUE.game_id, CLUE.clue_id, "")


def test_pass_is_bounded_by_the_memory_that_was_measured(node, monkeypatch):
    player = ask(node, monkeypatch)
    monkeypatch.setattr(node.trainer, "budget", node.trainer.budget.below(16))
    player.think(lambda: node.choice_scorer)
    (_, row) = player._opinion
    assert row.reason.endswith(f"memory for {node.trainer.budget.tokens}")

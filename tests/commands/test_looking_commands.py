"""`hivewright eval`, `answers` and `chat` on a node with the small model and a few rounds."""

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.unit.test_node import enrolled, make_node
from worker import environments, evaluation, model_setup, settings
from worker.cli import _parser
from worker.commands import chat, evaluate, show_answers
from worker.errors import ModelError, TrainingError
from worker.telemetry import answer_log, evaluation_log, status
from worker.telemetry.model_card import model_card


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> settings.Settings:
    """Train a node for six rounds with evaluations before, between and after."""
    made = enrolled(
        tmp_path_factory.mktemp("looking") / "node",
        node_eval_every_rounds=3,
        node_eval_seconds=60.0,
    )
    node = make_node(made)
    node.train()
    node.close()
    return made


def command(name: str, *words: str) -> argparse.Namespace:
    return _parser().parse_args([name, "--settings", "x", *words])


def evaluated(made: settings.Settings, capsys, *words: str) -> dict:
    torch.set_num_threads(1)
    evaluate.run(made, command("eval", "--json", "--tasks", "4", *words))
    return json.loads(capsys.readouterr().out)


def test_node_evaluates_itself_before_and_after(trained):
    folder = trained.node.state_dir
    done = evaluation_log.read(folder)
    assert [e.rounds_trained for e in done] == [0, 3, 6]
    assert [e.round is None for e in done] == [True, False, False]
    assert {(s.family, s.level) for s in done[0].scores} == {("gcd", 0), ("basic_arithmetic", 0)}
    shown = status.read(folder)
    assert (shown.held_out_before, shown.held_out_now) == (done[0].reward, done[-1].reward)
    card = model_card(trained, shown, status.read_rounds(folder))
    assert (
        f"held-out reward | {done[-1].reward:.3f} now, {done[0].reward:.3f} before training" in card
    )


def test_held_out_reward_is_that_of_an_independent_scorer(trained, capsys):
    """reasoning-gym itself scores the same policy's answers to the same tasks."""
    found = evaluated(trained, capsys, "--now")["now"]
    policy, _ = model_setup.load_trained(trained, trained.node.state_dir / "checkpoints")
    environment = environments.load(trained.environment)
    tasks = {
        one: environment.tasks_of(*one, evaluation.HELD_OUT, 4)
        for one in (("gcd", 0), ("basic_arithmetic", 0))
    }
    order = [(one, tasks[one][i]) for i in range(4) for one in tasks]
    groups = policy.generate(
        [environment.question(task) for _, task in order], trained.generation, 0
    )
    means = {one: [] for one in tasks}
    for (one, task), completions in zip(order, groups, strict=True):
        texts = [c.text for c in completions]
        means[one].append(sum(environment.score(task, texts)) / len(texts))
    by_family = {(s["family"], s["level"]): s["reward"] for s in found["scores"]}
    assert by_family == pytest.approx({one: sum(values) / 4 for one, values in means.items()})


def test_before_is_the_untouched_model_and_now_the_checkpoint(trained, capsys):
    found = evaluated(trained, capsys)
    assert list(found) == ["before", "now"]
    assert (found["before"]["rounds_trained"], found["now"]["rounds_trained"]) == (0, 6)
    assert evaluated(trained, capsys, "--before")["before"]["scores"] == found["before"]["scores"]
    untouched = model_setup.load_policy(trained).model.state_dict()
    now, _ = model_setup.load_trained(trained, trained.node.state_dir / "checkpoints")
    assert any(
        not torch.equal(weight, untouched[name])
        for name, weight in now.model.state_dict().items()
        if name in untouched
    )


def test_table_fits_80_columns(trained, capsys):
    evaluate.run(trained, command("eval", "--tasks", "2"))
    text = capsys.readouterr().out
    assert "before: the untouched model: mean reward" in text
    assert "now: after 6 rounds: mean reward" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "gain" in text


def test_eval_without_a_checkpoint_says_so(tmp_path):
    made = enrolled(tmp_path / "node")
    with pytest.raises(
        TrainingError, match="no checkpoint; train first, or evaluate the model with --before"
    ):
        evaluate.run(made, command("eval", "--now"))


def test_checkpoint_that_is_being_written_is_not_looked_at(trained, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained.node.state_dir / "checkpoints", folder)
    (folder / ".unfinished-checkpoint-00000099").mkdir()
    found = evaluated(trained, capsys, "--now", "--checkpoint", str(folder))
    assert found["now"]["rounds_trained"] == 6
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    assert (
        evaluated(trained, capsys, "--now", "--checkpoint", str(newest))["now"]["rounds_trained"]
        == 6
    )


def test_damaged_newest_checkpoint_is_passed_over(trained, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained.node.state_dir / "checkpoints", folder)
    (sorted(folder.glob("checkpoint-*"))[-1] / "model.safetensors").write_bytes(b"cut")
    assert (
        evaluated(trained, capsys, "--now", "--checkpoint", str(folder))["now"]["rounds_trained"]
        == 5
    )


def test_checkpoint_of_another_model_is_a_model_error(trained, tmp_path):
    other = enrolled(tmp_path / "node", trainer_lora={"rank": 2})
    shutil.copytree(trained.node.state_dir / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ModelError, match="weights do not fit"):
        evaluate.run(other, command("eval", "--now", "--checkpoint", str(tmp_path / "checkpoints")))


def test_all_groups_of_all_rounds_are_on_disk(trained):
    kept = list(answer_log.read(trained.node.state_dir))
    assert {group.round for group in kept} == {
        row["round"] for row in status.read_rounds(trained.node.state_dir)
    }
    assert all(len(group.answers) == trained.generation.num_generations for group in kept)
    learned = [group for group in kept if group.trained]
    assert learned
    assert all(any(answer.advantage for answer in group.answers) for group in learned)
    assert all(
        answer.logprob is not None
        for group in kept
        for answer in group.answers
        if group.peer_id is None
    )
    assert {group.level for group in kept} == {0}
    environment = environments.load(trained.environment)
    group = next(g for g in kept if g.right is not None)
    assert group.question
    assert environment.names == ("gcd", "basic_arithmetic")


def test_answers_command_shows_what_the_node_kept(trained, capsys):
    show_answers.run(trained, command("answers", "--limit", "3"))
    assert "right answer:" in capsys.readouterr().out


def test_chat_answers_each_line(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\n\nAnd 4?\n"))
    chat.run(trained, command("chat", "--tokens", "8"))
    captured = capsys.readouterr()
    assert "the checkpoint after 6 rounds" in captured.err
    assert len(captured.out.splitlines()) >= 2


def test_chat_in_the_form_of_the_tasks(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Calculate 2 + 3.\n"))
    chat.run(trained, command("chat", "--tokens", "8", "--task", "--before"))
    assert "the untouched model" in capsys.readouterr().err


def test_conversation_that_is_too_long_begins_again(trained, capsys):
    policy = model_setup.load_policy(trained)
    conversation = chat.Conversation(policy, trained.generation, 0, as_task=False)
    shown: list[str] = []
    chat._answer(conversation, "word " * 400, shown.append)
    assert shown == ["(too long for generation.max_prompt_length; a new conversation begins)"]
    assert conversation.turns == []


def test_full_disk_under_the_answers_costs_no_round(tmp_path, monkeypatch, caplog):
    made = enrolled(tmp_path / "node", node_max_rounds=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answer_log.AnswerLog, "_write", full)
    node = make_node(made)
    node.train()
    node.close()
    assert caplog.text.count("training continues") == 1
    assert len(status.read_rounds(Path(made.node.state_dir))) >= 2

"""The answers on disk: bounded, readable, harmless to show, and never a reason to stop training."""

import argparse
import io
import json
from contextlib import redirect_stdout

import pytest
from rich.console import Console

from tests.groups import scored_group
from worker.cli import _parser
from worker.commands import show_answers
from worker.errors import WorkerError
from worker.records import Task
from worker.settings import Settings
from worker.swarm.identity import animal_name
from worker.telemetry import answer_log
from worker.telemetry.answer_log import Answer, AnsweredGroup, AnswerLog

PEER = "QmPeerAnswersHereAndThere"


def group(
    round: int,
    family: str = "gcd",
    peer_id: str | None = None,
    rewards=(1.0, 0.0),
    text: str = "say",
):
    listed = tuple(
        Answer(f"{text} {i}", reward, reward - 0.5, -1.25, False)
        for i, reward in enumerate(rewards)
    )
    return AnsweredGroup(round, family, 2, "system", peer_id, True, "What is it?", "42", listed)


def settings_of(folder) -> Settings:
    return Settings.model_validate({"node": {"state_dir": folder}})


def command(*words: str) -> argparse.Namespace:
    return _parser().parse_args(["answers", "--settings", "x", *words])


def shown(folder, *words: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        show_answers.run(settings_of(folder), command(*words))
    return output.getvalue()


def test_what_is_written_is_read_newest_first(tmp_path):
    log = AnswerLog(tmp_path, 10, 10)
    for round in (3, 4):
        log.write(round, [group(round), group(round, "chain_sum", PEER)])
    assert [(g.round, g.family) for g in answer_log.read(tmp_path)] == [
        (4, "gcd"),
        (4, "chain_sum"),
        (3, "gcd"),
        (3, "chain_sum"),
    ]
    assert next(iter(answer_log.read(tmp_path, 4))) == group(4)
    assert [g.round for g in answer_log.read(tmp_path, 0, 3)] == [3, 3]


def test_round_that_is_made_again_replaces_the_first_attempt(tmp_path):
    log = AnswerLog(tmp_path, 10, 10)
    log.write(3, [group(3, text="first")])
    log.write(3, [group(3, text="second")])
    assert [g.answers[0].text for g in answer_log.read(tmp_path)] == ["second 0"]


def test_only_the_newest_rounds_stay(tmp_path):
    log = AnswerLog(tmp_path, 3, 10)
    for round in range(6):
        log.write(round, [group(round)])
    assert [g.round for g in answer_log.read(tmp_path)] == [5, 4, 3]


def test_size_is_bounded(tmp_path):
    log = AnswerLog(tmp_path, 1000, 1)
    texts = [
        "".join(chr(33 + (i * i * 7 + i * round) % 90) for i in range(300_000))
        for round in range(5)
    ]
    for round, text in enumerate(texts):
        log.write(round, [group(round, text=f"{text}{round}")])
    assert sum(file.stat().st_size for file in (tmp_path / "answers").iterdir()) <= 1_000_000
    assert next(answer_log.read(tmp_path)).round == 4


def test_no_rounds_means_no_folder(tmp_path):
    AnswerLog(tmp_path, 0, 10).write(1, [group(1)])
    assert not (tmp_path / "answers").exists()


def test_full_disk_is_logged_once_and_again_when_it_works(tmp_path, caplog, monkeypatch):
    log = AnswerLog(tmp_path, 10, 10)
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:

        def full(**_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("tempfile.mkstemp", full)
        log.write(1, [group(1)])
        log.write(2, [group(2)])
    assert caplog.text.count("answers of this round not written, training continues") == 1
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "answers").iterdir())
    log.write(3, [group(3)])
    assert "answers are written again" in caplog.text
    assert [g.round for g in answer_log.read(tmp_path)] == [3]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    log = AnswerLog(tmp_path, 10, 10)
    log.write(1, [group(1)])
    leftover = tmp_path / "answers" / ".round-00000002.jsonl.zst.abc"
    leftover.write_bytes(b"half")
    assert [g.round for g in answer_log.read(tmp_path)] == [1]
    log.write(2, [group(2)])
    assert not leftover.exists()
    assert [g.round for g in answer_log.read(tmp_path)] == [2, 1]


@pytest.mark.parametrize("data", [b"", b"not zstd", b"\x28\xb5\x2f\xfd\x04\x00"])
def test_damaged_file_is_named(tmp_path, data):
    AnswerLog(tmp_path, 10, 10).write(1, [group(1)])
    file = tmp_path / "answers" / "round-00000001.jsonl.zst"
    file.write_bytes(data)
    with pytest.raises(
        WorkerError, match=r"round-00000001\.jsonl\.zst: not a valid round of answers"
    ):
        list(answer_log.read(tmp_path))


def test_record_of_a_scored_group():
    task = Task("gcd", "0" * 12, 1, 2)
    peers = scored_group(task, "?", ("a", "b"), (1.0, 0.0), peer_id=PEER)
    record = answer_log.of_group(
        peers,
        7,
        level=None,
        form="begun",
        right="1",
        advantages=(0.7, -0.7),
        logprobs=(None, -2.0),
        trained=True,
    )
    assert record.answers == (Answer("a", 1.0, 0.7, None, None), Answer("b", 0.0, -0.7, -2.0, None))
    assert (record.peer_id, record.round, record.best.text, record.worst.text) == (
        PEER,
        7,
        "a",
        "b",
    )


@pytest.fixture
def filled(tmp_path):
    log = AnswerLog(tmp_path, 10, 10)
    log.write(1, [group(1), group(1, "chain_sum", PEER, (0.0, 0.0))])
    log.write(2, [group(2, rewards=(1.0, 1.0)), group(2, "chain_sum", PEER)])
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), [(2, "gcd"), (2, "chain_sum"), (1, "gcd"), (1, "chain_sum")]),
        (("--family", "gcd"), [(2, "gcd"), (1, "gcd")]),
        (("--peer", "own"), [(2, "gcd"), (1, "gcd")]),
        (("--peer", "peers"), [(2, "chain_sum"), (1, "chain_sum")]),
        (("--peer", "QmPeerAnswers"), [(2, "chain_sum"), (1, "chain_sum")]),
        (("--peer", animal_name(PEER)), [(2, "chain_sum"), (1, "chain_sum")]),
        (("--round", "1"), [(1, "gcd"), (1, "chain_sum")]),
        (("--round", "2-"), [(2, "gcd"), (2, "chain_sum")]),
        (("--reward", "0.4-0.6"), [(2, "chain_sum"), (1, "gcd")]),
        (("--reward", "1"), [(2, "gcd")]),
        (("--limit", "1"), [(2, "gcd")]),
    ],
)
def test_filters(filled, words, expected):
    lines = [json.loads(line) for line in shown(filled, "--json", *words).splitlines()]
    assert [(line["round"], line["family"]) for line in lines] == expected


def test_picture_has_best_and_worst_next_to_each_other(filled):
    text = shown(filled, "--round", "1", "--family", "gcd")
    row = next(line for line in text.splitlines() if "say 0" in line)
    assert row.index("say 0") < row.index("say 1")
    for expected in (
        "round 1",
        "gcd level 2",
        "own",
        "mean 0.50",
        "What is it?",
        "right answer: 42",
        "advantage +0.50",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80
    assert "say 1" in shown(filled, "--all", "--round", "1", "--family", "gcd")


def test_text_of_peers_is_neither_markup_nor_control_characters(tmp_path):
    hostile = "[bold red]x[/] [/ip4/1.2.3.4] \x1b[2J\x1b]0;owned\x07 \u202e \x00 end"
    AnswerLog(tmp_path, 10, 10).write(1, [group(1, text=hostile, peer_id=PEER)])
    console = Console(record=True, width=200, file=io.StringIO(), force_terminal=True)
    show_answers._show(console, list(answer_log.read(tmp_path)), True)
    text = console.export_text()
    assert "[bold red]x[/] [/ip4/1.2.3.4]" in text
    assert "\\x1b[2J" in text
    assert not set("\x1b\x07\x00\u202e") & set(text)


def test_no_match_says_what_there_is(filled):
    with pytest.raises(WorkerError, match="--family gdc; there are rounds 1 to 2, families chain"):
        shown(filled, "--family", "gdc")


@pytest.mark.parametrize(
    "words", [("--round", "x"), ("--round", "1-y"), ("--reward", "2"), ("--reward", "0.9-0.1")]
)
def test_wrong_range_is_one_line_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*words)
    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err

"""The answers on disk: bounded, readable, harmless to show, and never a reason to stop training."""

import argparse
import io
import json
from contextlib import redirect_stdout
from dataclasses import asdict

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.groups import scored_group
from tests.limits import largest_file
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


TEXTS = st.text(max_size=30) | st.sampled_from(["\u2028", "\x85", "\r\n", "\0", "</answer>"])
ANSWERS = st.builds(
    Answer,
    TEXTS,
    st.floats(0, 1),
    st.floats(-3, 3),
    st.none() | st.floats(max_value=0, allow_infinity=False),
    st.none() | st.booleans(),
)
GROUPS = st.builds(
    AnsweredGroup,
    st.integers(0, 10**8 - 1),
    TEXTS,
    st.none() | st.integers(0, 9),
    st.just("system"),
    st.none() | TEXTS,
    st.booleans(),
    TEXTS,
    st.none() | TEXTS,
    st.lists(ANSWERS, min_size=1, max_size=3).map(tuple),
)


@given(st.lists(GROUPS, min_size=1, max_size=4))
def test_any_texts_come_back_as_they_were(tmp_path_factory, groups):
    folder = tmp_path_factory.mktemp("any")
    AnswerLog(folder, 10, 10).write(3, groups)
    assert list(answer_log.read(folder)) == groups


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 6))
def test_kept_rounds_are_the_newest_of_all_that_were_written(tmp_path_factory, rounds, most):
    folder = tmp_path_factory.mktemp("rounds")
    log = AnswerLog(folder, most, 10)
    kept: set[int] = set()
    for round in rounds:
        log.write(round, [group(round)])
        kept = set(sorted(kept)[-most:]) | {round}
        kept = set(sorted(kept)[-most:])
        assert [g.round for g in answer_log.read(folder)] == sorted(kept, reverse=True)


@pytest.mark.parametrize(("size", "reason"), [(1000, None), (1001, "claims more than 1000")])
def test_round_that_unpacks_to_more_than_a_node_writes_is_not_unpacked(
    tmp_path, monkeypatch, size, reason
):
    monkeypatch.setattr(answer_log, "_LARGEST_ROUND", 1000)
    line = json.dumps(asdict(group(1))).encode()
    (tmp_path / "answers").mkdir()
    file = tmp_path / "answers/round-00000001.jsonl.zst"
    file.write_bytes(zstandard.compress(line + b" " * (size - len(line))))
    if reason is None:
        assert list(answer_log.read(tmp_path)) == [group(1)]
        return
    with pytest.raises(WorkerError, match=reason):
        list(answer_log.read(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"\xff\n",
        b"not JSON\n",
        json.dumps(asdict(group(1)) | {"answers": []}).encode(),
        json.dumps(asdict(group(1)) | {"round": "first"}).encode(),
        json.dumps(asdict(group(1)) | {"question": None}).encode(),
    ],
)
def test_round_of_something_else_is_named(tmp_path, content):
    (tmp_path / "answers").mkdir()
    file = tmp_path / "answers/round-00000001.jsonl.zst"
    file.write_bytes(zstandard.compress(content))
    with pytest.raises(WorkerError, match=rf"^{file}: not a valid round of answers .*; remove it"):
        list(answer_log.read(tmp_path))


def test_file_with_something_after_its_end_is_not_valid(tmp_path):
    AnswerLog(tmp_path, 10, 10).write(1, [group(1)])
    file = tmp_path / "answers/round-00000001.jsonl.zst"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(WorkerError, match="not a valid round"):
        list(answer_log.read(tmp_path))


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "answers").mkdir()
    others = ["round-.jsonl.zst", "round-x.jsonl.zst", "notes.txt", "round-00000001.jsonl"]
    for name in others:
        (tmp_path / "answers" / name).write_text("mine")
    log = AnswerLog(tmp_path, 1, 10)
    for round in (1, 2):
        log.write(round, [group(round)])
    assert [g.round for g in answer_log.read(tmp_path)] == [2]
    assert {file.name for file in (tmp_path / "answers").iterdir()} == {
        *others,
        "round-00000002.jsonl.zst",
    }


def test_round_that_is_larger_than_the_limit_is_not_kept(tmp_path):
    log = AnswerLog(tmp_path, 10, 0)
    log.write(1, [group(1)])
    assert list(answer_log.read(tmp_path)) == []


def test_full_disk_costs_the_new_round_and_no_old_one(tmp_path, caplog):
    log = AnswerLog(tmp_path, 10, 10)
    log.write(1, [group(1)])
    noise = "".join(chr(0x4E00 + i * i % 20_000) for i in range(10_000))
    with largest_file(4096):
        log.write(2, [group(2, text=noise)])
    assert "answers of this round not written" in caplog.text
    assert [g.round for g in answer_log.read(tmp_path)] == [1]


def test_range_that_ends_before_it_begins_is_refused(capsys):
    assert command("--round", "20-20").round == (20, 20)
    for words in ("20-12", "9" * 30, f"1-{'9' * 5000}"):
        with pytest.raises(SystemExit):
            command("--round", words)
        assert "expected a round, or a range such as 12-20" in capsys.readouterr().err

"""Evaluation questions: one answer each, and no more open than there may be."""

import threading

import pytest

from worker import environments, settings
from worker.environments.answers import tagged
from worker.environments.presets import DEMO_FAMILIES
from worker.judge import questions
from worker.judge.questions import MAX_SESSIONS, Questions


@pytest.fixture(scope="module")
def environment():
    return environments.load(settings.Environment(families=DEMO_FAMILIES))


def right_answer(asked: Questions, session: str) -> str:
    return asked._environment.answer(asked._open[session])


def test_right_answer_earns_everything_bare_or_tagged(environment):
    asked = Questions(environment)
    for form in (str, tagged, lambda answer: f"I think\n{tagged(answer)}"):
        session, question = asked.ask()
        assert question
        assert asked.score(session, form(right_answer(asked, session))) == pytest.approx(1.0)


@pytest.mark.parametrize("answer", ["", " ", "\0", "<answer>", "</answer><answer>", "x" * 8192])
def test_wrong_answers_of_any_form_earn_less(environment, answer):
    asked = Questions(environment)
    session, _ = asked.ask()
    reward = asked.score(session, answer)
    assert reward is not None
    assert 0 <= reward < 0.5


def test_session_has_one_answer(environment):
    asked = Questions(environment)
    session, _ = asked.ask()
    right = right_answer(asked, session)
    assert asked.score(session, "wrong") is not None
    assert asked.score(session, right) is None
    assert asked.score("no such session", right) is None
    assert asked.score("", right) is None


def test_oldest_question_is_forgotten_beyond_the_limit(environment, monkeypatch):
    monkeypatch.setattr(questions, "MAX_SESSIONS", 3)
    asked = Questions(environment)
    sessions = [asked.ask()[0] for _ in range(4)]
    assert len(set(sessions)) == 4
    assert asked.score(sessions[0], "x") is None
    assert all(asked.score(session, "x") is not None for session in sessions[1:])
    assert MAX_SESSIONS >= 1000


def test_questions_can_not_be_predicted(environment):
    first, second = Questions(environment), Questions(environment)
    assert {first.ask()[1] for _ in range(10)} != {second.ask()[1] for _ in range(10)}


def test_of_two_answers_at_once_one_counts(environment):
    asked = Questions(environment)
    sessions = [asked.ask()[0] for _ in range(20)]
    counted: list[str] = []

    def answer() -> None:
        counted.extend(session for session in sessions if asked.score(session, "x") is not None)

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == sorted(sessions)

from worker.policy.answer_length import ENOUGH, ROUNDS, AnswerLength
from worker.records import Completion, Rollout, ScoredGroup, Task
from worker.settings import Generation

TASK = Task("basic_arithmetic", "0" * 12, 1, 0)
CLOSED, OPEN = "<answer>7</answer>", "and so on"


def group(*answers):
    """Answers are (text, number of tokens)."""
    rollouts = (
        Rollout(text, 0.0, Completion(text, (1,) * length, (0.0,) * length, text == OPEN))
        for text, length in answers
    )
    return ScoredGroup(TASK, "?", tuple(rollouts))


def limit(*rounds, **options):
    length = AnswerLength()
    for groups in rounds:
        length.see(groups)
    return length.limit(Generation(**options))


def test_answers_may_be_twice_as_long_as_nearly_all_that_closed():
    lengths = [*range(20, 60), 200]  # the one at 200 is beyond the 95th percentile
    assert limit([group(*((CLOSED, n) for n in lengths))]) == 128  # 2 x 58, in steps of 16


def test_open_answers_do_not_count():
    answers = [(CLOSED, 30)] * ENOUGH + [(OPEN, 256)] * 100
    assert limit([group(*answers)]) == 64


def test_the_full_limit_stays_until_enough_answers_have_closed():
    assert limit() == 256
    assert limit([group(*[(CLOSED, 30)] * (ENOUGH - 1))]) == 256
    assert limit(*[[group(*[(CLOSED, 30)] * (ENOUGH // 2))]] * 2) == 64


def test_the_limit_is_within_32_tokens_and_the_settings_own():
    assert limit([group(*[(CLOSED, 3)] * ENOUGH)]) == 32
    assert limit([group(*[(CLOSED, 90)] * ENOUGH)], max_completion_length=100) == 100


def test_old_rounds_are_forgotten():
    long, short = [group(*[(CLOSED, 100)] * ENOUGH)], [group(*[(CLOSED, 20)] * ENOUGH)]
    assert limit(long, *[short] * (ROUNDS - 1)) == 208
    assert limit(long, *[short] * ROUNDS) == 48


def test_an_answer_that_needs_more_raises_the_limit_again():
    assert limit([group(*[(CLOSED, 40)] * ENOUGH)]) == 80
    assert limit([group(*[(CLOSED, 80)] * ENOUGH)]) == 160


def test_settings_can_ask_for_the_full_limit_always():
    assert limit([group(*[(CLOSED, 30)] * ENOUGH)], completion_length="max") == 256
    generation = Generation()
    assert AnswerLength().apply(generation) == generation

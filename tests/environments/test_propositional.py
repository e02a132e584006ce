"""Truth tables and prime implicates, compared with evaluation by hand of every assignment."""

import itertools
import random
from collections.abc import Callable, Mapping

import pytest
from reasoning_gym.logic.propositional_logic import Expression

from worker.environments import propositional
from worker.environments.propositional import Tables, follows

Assignment = Mapping[str, bool]
FORMULAS: dict[str, Callable[[Assignment], bool]] = {
    "P": lambda v: v["P"],
    "¬P": lambda v: not v["P"],
    "(P ∧ Q)": lambda v: v["P"] and v["Q"],
    "(P ∨ Q)": lambda v: v["P"] or v["Q"],
    "(P → Q)": lambda v: not v["P"] or v["Q"],
    "(P ↔ Q)": lambda v: v["P"] == v["Q"],
    "¬(P ∨ (Q → ¬R))": lambda v: not (v["P"] or (not v["Q"] or not v["R"])),
    "((P → Q) ↔ (¬Q → ¬P))": lambda v: True,
}


def assignments(variables: str) -> list[dict[str, bool]]:
    """Return all assignments in the order of a table's bits: the first variable changes fastest."""
    rows = itertools.product((False, True), repeat=len(variables))
    return [dict(zip(reversed(variables), row, strict=True)) for row in rows]


def table_of(variables: str, is_true: Callable[[Assignment], bool]) -> int:
    return sum(1 << row for row, v in enumerate(assignments(variables)) if is_true(v))


@pytest.mark.parametrize("text", FORMULAS)
def test_table_has_the_value_under_each_assignment(text: str) -> None:
    tables = Tables("RQP")  # they are sorted
    assert tables.of(Expression.from_string(text)) == table_of("PQR", FORMULAS[text])


def test_unknown_variable_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Tables("PQ").of(Expression.from_string("(P ∨ X)"))


def test_clauses_are_all_of_their_length_with_their_tables() -> None:
    tables = Tables("PQR")
    clauses = dict(tables.clauses(2))
    assert len(clauses) == 3 * 4
    for clause, table in clauses.items():
        expected = table_of("PQR", lambda v, c=clause: any(v[n] == sign for n, sign in c))  # type: ignore[misc]
        assert table == expected
    assert len(dict(tables.clauses(3))) == 8


def test_conclusion_follows_where_it_is_true_in_every_row_of_the_premise() -> None:
    for premise, conclusion in itertools.product(range(16), repeat=2):
        rows = [(premise >> row & 1, conclusion >> row & 1) for row in range(4)]
        assert follows(conclusion, premise) == all(c for p, c in rows if p)


def test_prime_implicates_are_the_shortest_clauses_that_follow() -> None:
    rng, tables = random.Random(0), Tables("PQR")
    every = [pair for length in (1, 2, 3) for pair in tables.clauses(length)]
    for formula in rng.sample(range(1, 255), 60):
        implied = {clause for clause, table in every if follows(table, formula)}
        minimal = {c for c in implied if not any(other < c for other in implied)}
        found = tables.prime_implicates(formula)
        assert found.keys() == minimal
        # Together they say exactly what the formula says.
        together = tables.true
        for table in found.values():
            together &= table
        assert together == formula


def test_formula_without_a_false_row_has_no_implicates() -> None:
    tables = Tables("PQ")
    assert tables.prime_implicates(tables.true) == {}


def item_of(variables: str, *premises: str) -> dict[str, object]:
    return {"metadata": {"variables": list(variables), "premises": list(premises)}}


def test_sound_item_has_a_conclusion_that_earns_and_that_no_premise_implies() -> None:
    rng, num_sound = random.Random(1), 0
    texts = ["P", "¬Q", "(P → Q)", "(Q → R)", "(P ∨ R)", "(¬P ∨ ¬R)", "(P ↔ R)", "(Q ∧ R)"]
    short = [*"PQR", "¬P", "¬Q", "¬R"]
    answers = short + [f"({a} ∨ {b})" for a, b in itertools.combinations(short, 2)]
    for _ in range(40):
        item = item_of("PQR", *rng.sample(texts, 3))
        earns = any(propositional.score(item, answer) == 1.0 for answer in answers)
        if propositional.is_sound(item):
            num_sound += 1
            assert earns, item
    assert num_sound >= 5


@pytest.mark.parametrize("answer", ["", "P ∧", "X", "(((P", "P" * 257, "0", "P Q"])
def test_answer_that_is_no_formula_of_these_variables_earns_nothing(answer: str) -> None:
    item = item_of("PQ", "P", "(P → Q)")
    assert propositional.score(item, answer) in (0.0, propositional.WELL_FORMED)
    assert propositional.score(item, answer) < 1.0

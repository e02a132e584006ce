"""Score conclusions in reasoning-gym's `propositional_logic`: none that one premise implies.

A truth table over n variables is an integer of 2^n bits, one for each assignment. A clause is a set
of literals, and is true unless all of them are false. A conclusion earns a reward if

* it follows from the premises together and is not a tautology;
* none of its prime implicates (the shortest clauses that it implies) follows from one premise
  alone, so neither a copied premise, nor a weakened one, nor several joined by "and" earn;
* it is written with no more literals than its prime implicates have, so a disguised conjunction of
  premises does not earn.

Items whose premises contradict each other, or that have no such conclusion of one or two literals,
are not used. Of those that imply a single variable (most items at the easiest level) only one in
three is used: otherwise the answer "Q", whatever the premises are, would earn 0.4.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any

from reasoning_gym.logic.propositional_logic import Expression, Operator

WELL_FORMED = 0.05
"""Reward of a formula that is not a valid conclusion, as in the family's own scorer."""

MAX_LENGTH = 256
"""Largest number of characters of an answer: enough for ten literals with connectives.

reasoning-gym's parser takes quadratic time.
"""

MAX_VARIABLES = 6
"""Largest number n of variables in a conclusion: all of its 3^n clauses are examined."""


class Tables:
    """Truth tables over `variables`, as integers of 2^n bits."""

    def __init__(self, variables: Iterable[str]) -> None:
        self.variables = sorted(variables)
        size = 1 << len(self.variables)
        self.true = (1 << size) - 1
        self._columns = {
            name: sum(1 << row for row in range(size) if row >> place & 1)
            for place, name in enumerate(self.variables)
        }

    def of(self, expression: Expression) -> int:
        """Return the table of a formula. Raises KeyError for an unknown variable."""
        if expression.operator is None:
            return self._columns[expression.left]
        left = self.of(expression.left)
        if expression.operator == Operator.NOT:
            return self.true & ~left
        right = self.of(expression.right)
        if expression.operator == Operator.AND:
            return left & right
        if expression.operator == Operator.OR:
            return left | right
        if expression.operator == Operator.IMPLIES:
            return self.true & ~left | right
        return self.true & ~(left ^ right)

    def clauses(
        self,
        length: int,
    ) -> Iterator[tuple[frozenset[tuple[str, bool]], int]]:
        """Yield every clause of `length` literals (variable, sign) with its table."""
        for names in combinations(self.variables, length):
            for signs in product((True, False), repeat=length):
                table = 0
                for name, sign in zip(names, signs, strict=True):
                    column = self._columns[name]
                    table |= column if sign else self.true & ~column
                yield frozenset(zip(names, signs, strict=True)), table

    def prime_implicates(
        self,
        formula: int,
    ) -> dict[frozenset[tuple[str, bool]], int]:
        """Return the clauses that a formula implies and that contain no shorter such clause.

        Each comes with its table.
        """
        found: dict[frozenset[tuple[str, bool]], int] = {}
        for length in range(1, len(self.variables) + 1):
            for clause, table in self.clauses(length):
                if follows(table, formula) and not any(shorter < clause for shorter in found):
                    found[clause] = table
        return found


def follows(conclusion: int, premise: int) -> bool:
    """Return whether `conclusion` is true wherever `premise` is (both are truth tables)."""
    return premise & ~conclusion == 0


def is_sound(item: dict[str, Any]) -> bool:
    """Return whether the premises are consistent and imply something that no single one does."""
    tables, premises = _read_premises(item)
    together = _all_of(premises, tables.true)
    if together == 0:
        return False
    conclusions = [
        clause
        for length in (1, 2)
        for clause, table in tables.clauses(length)
        if table != tables.true
        and follows(table, together)
        and not any(follows(table, premise) for premise in premises)
    ]
    plain = [clause for clause in conclusions if len(clause) == 1]
    is_plain = any(sign for clause in plain for _, sign in clause)
    return bool(conclusions) and (not is_plain or _is_drawn(item))


def _is_drawn(item: dict[str, Any]) -> bool:
    """Return whether the item is the one in three that is used: the same one in every process."""
    premises = "\n".join(item["metadata"]["premises"])
    digest = hashlib.sha256(premises.encode()).digest()
    return digest[0] % 3 == 0


def score(
    item: dict[str, Any],
    answer: str,
) -> float:
    """Return 1 for a conclusion (see the module), WELL_FORMED for another formula, else 0."""
    if len(answer) > MAX_LENGTH:
        return 0.0
    tables, premises = _read_premises(item)
    try:
        expression = Expression.from_string(answer)
        table = tables.of(expression)
    except (AttributeError, KeyError, RecursionError, ValueError):
        return 0.0
    if table == tables.true or not follows(table, _all_of(premises, tables.true)):
        return WELL_FORMED
    variables = set(_leaves(expression))
    if len(variables) > MAX_VARIABLES:
        return WELL_FORMED
    own = Tables(variables)
    implicates = own.prime_implicates(own.of(expression))
    if sum(1 for _ in _leaves(expression)) > sum(len(clause) for clause in implicates):
        return WELL_FORMED
    if any(_follows_from_one(clause, tables, premises) for clause in implicates):
        return WELL_FORMED
    return 1.0


def _follows_from_one(
    clause: frozenset[tuple[str, bool]],
    tables: Tables,
    premises: list[int],
) -> bool:
    table = 0
    for name, sign in clause:
        column = tables.of(Expression(None, name))
        table |= column if sign else tables.true & ~column
    return any(follows(table, premise) for premise in premises)


def _read_premises(item: dict[str, Any]) -> tuple[Tables, list[int]]:
    metadata = item["metadata"]
    tables = Tables(metadata["variables"])
    return tables, [tables.of(Expression.from_string(text)) for text in metadata["premises"]]


def _all_of(
    premises: Iterable[int],
    true: int,
) -> int:
    for premise in premises:
        true &= premise
    return true


def _leaves(expression: Expression) -> Iterator[str]:
    """Yield the variables of a formula, once for each occurrence."""
    if expression.operator is None:
        yield expression.left
    else:
        yield from _leaves(expression.left)
        if expression.right is not None:
            yield from _leaves(expression.right)

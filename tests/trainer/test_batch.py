import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.groups import scored_group
from worker import settings
from worker.records import Task
from worker.trainer.batch import choose


def groups(count, rewards=(0.0, 1.0), peer_id=None):
    return [
        scored_group(Task("gcd", "0" * 12, 1, i), "?", ("a", "b"), rewards, peer_id=peer_id)
        for i in range(count)
    ]


def find_fault(group):
    return (
        group.question
        if group.question != "?"
        else None
        if group.rewards and group.has_signal
        else "no-signal"
    )


def draw(local, external, **options):
    trainer = settings.Trainer(**{"local_groups": 3, "external_groups": 2, **options})
    return choose(local, external, trainer, random.Random(0), find_fault)


def test_i_local_and_j_external_groups_are_drawn():
    batch = draw(groups(9), groups(9, peer_id="p"))
    assert (batch.num_local, batch.num_external) == (3, 2)
    assert [g.peer_id for g in batch.groups] == [None, None, None, "p", "p"]
    assert batch.dropped == {"surplus-local": 6, "surplus-external": 7}
    assert len({g.task.index for g in batch.groups[:3]}) == 3


def test_groups_without_a_signal_are_dropped_first():
    local = [*groups(6, rewards=(1.0, 1.0)), *groups(2)]
    batch = draw(local, groups(9, peer_id="p"), fill_missing=False)
    assert (batch.num_local, batch.num_external) == (2, 2)
    assert all(g.has_signal for g in batch.groups)
    assert batch.dropped == {"no-signal-local": 6, "surplus-external": 7, "missing-local": 1}


def test_groups_that_can_not_be_trained_on_take_no_places(caplog):
    faulty = [replace(group, question="prompt-length") for group in groups(9, peer_id="p")]
    batch = draw(groups(3), [*faulty, *groups(2, peer_id="q")])
    assert [g.peer_id for g in batch.groups] == [None, None, None, "q", "q"]
    assert batch.dropped == {"prompt-length-external": 9}
    assert "group dropped reason=prompt-length family=gcd peer=p" in caplog.text


@pytest.mark.parametrize(
    ("num_local", "num_external", "fill", "drawn"),
    [
        (9, 0, True, (5, 0)),
        (9, 1, True, (4, 1)),
        (4, 0, True, (4, 0)),
        (0, 9, True, (0, 5)),
        (1, 9, True, (1, 4)),
        (9, 0, False, (3, 0)),
        (0, 9, False, (0, 2)),
        (0, 0, True, (0, 0)),
    ],
)
def test_missing_groups_are_filled_as_the_settings_say(num_local, num_external, fill, drawn):
    batch = draw(groups(num_local), groups(num_external, peer_id="p"), fill_missing=fill)
    assert (batch.num_local, batch.num_external) == drawn
    assert batch.dropped.get("missing-local", 0) == max(0, 3 - num_local)
    assert batch.dropped.get("missing-external", 0) == max(0, 2 - num_external)


def test_group_without_answers_is_dropped():
    empty = scored_group(Task("gcd", "0" * 12, 1, 0), "?", (), ())
    assert draw([empty], []).dropped["no-signal-local"] == 1


def test_same_rng_draws_the_same():
    local, external = groups(9), groups(9, peer_id="p")
    trainer = settings.Trainer()
    first, again, other = (
        choose(local, external, trainer, random.Random(n), find_fault) for n in (4, 4, 5)
    )
    assert first == again
    assert first != other


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(
    local=st.lists(st.booleans(), max_size=9),
    external=st.lists(st.booleans(), max_size=9),
    wanted=st.tuples(st.integers(0, 6), st.integers(1, 6)),
    fill=st.booleans(),
)
def test_every_group_is_drawn_dropped_or_surplus(
    local: list[bool], external: list[bool], wanted: tuple[int, int], fill: bool
) -> None:
    """True: a group with a signal."""
    own = [groups(1, (0.0, 1.0 if useful else 0.0))[0] for useful in local]
    foreign = [groups(1, (0.0, 1.0 if useful else 0.0), "p")[0] for useful in external]
    batch = draw(own, foreign, local_groups=wanted[0], external_groups=wanted[1], fill_missing=fill)
    assert len(batch.groups) == batch.num_local + batch.num_external
    assert [group.peer_id is None for group in batch.groups] == (
        [True] * batch.num_local + [False] * batch.num_external
    )
    assert all(group.has_signal for group in batch.groups)
    for kind, flags, num in (
        ("local", local, batch.num_local),
        ("external", external, batch.num_external),
    ):
        surplus = batch.dropped.get(f"surplus-{kind}", 0)
        assert num + surplus + batch.dropped.get(f"no-signal-{kind}", 0) == len(flags)
        assert batch.dropped.get(f"no-signal-{kind}", 0) == flags.count(False)
    total = sum(wanted)
    useful = local.count(True) + external.count(True)
    assert len(batch.groups) <= total
    if fill:
        assert len(batch.groups) == min(total, useful)
    else:
        assert batch.num_local == min(wanted[0], local.count(True))
        assert batch.num_external == min(wanted[1], external.count(True))

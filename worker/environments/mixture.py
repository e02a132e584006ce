"""A weighted mix of families: the tasks of a seed, the known recipes, and their difficulty.

A family of the settings is at one level of its curriculum, or at no level. The configurations of
*all* its levels are known here, so that tasks of a peer at another level can be made too: a task
names its configuration by a digest.
"""

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from worker import settings
from worker.environments.source import Config, Recipe, Source
from worker.errors import BadRecord, SettingsError, TrainingError
from worker.records import MAX_PART_TASKS, MAX_PARTS, ScoredGroup, Task, derived_seed

log = logging.getLogger(__name__)

MAX_INDEX = MAX_PARTS * MAX_PART_TASKS
"""Largest number of tasks of a seed: far more than any round has; recipes of peers are checked."""
RISE_AFTER = 10
"""Number of groups at a level before it may rise; a family of the default mix has one a round."""
SOLVED_AFTER = 3
"""Consecutive solved groups after which a level of `auto` rises at once."""
SOLVED = 0.95
AUTO_RISE_AT = 0.7
"""`rise_at` of a family whose level is `auto`, unless the settings have one."""
FALL_AFTER = 6
"""Consecutive groups without a signal and with almost no reward after which a level falls."""
HOPELESS = 0.1
MAX_FALLS = 4
DRAWN_BY = 8
"""Number of recent groups whose mean signal is the weight of a family with level `auto`."""


@dataclass
class _Standing:
    """The state of a family's curriculum.

    `rewards`: mean rewards of our last groups at this level, the newest last; `strengths`: the
    signals (`ScoredGroup.signal`) of our last groups of the family; `falls`: how often the level
    has fallen.
    """

    level: int
    rewards: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    falls: int = 0

    def see(
        self,
        rewards: Sequence[float],
        strengths: Sequence[float],
    ) -> None:
        self.rewards += rewards
        self.strengths += strengths
        del self.strengths[:-DRAWN_BY]
        del self.rewards[: -max(RISE_AFTER * (1 + self.falls), FALL_AFTER)]

    def is_solved(self, family: settings.Family) -> bool:
        """Return whether the level should rise.

        After each fall of the level it rises more slowly.
        """
        is_auto = family.level == "auto"
        last = self.rewards[-SOLVED_AFTER:]
        was_solved = len(last) == SOLVED_AFTER and min(last) >= SOLVED
        if is_auto and not self.falls and was_solved:
            return True
        rise_at = family.rise_at
        if is_auto and rise_at is None:
            rise_at = AUTO_RISE_AT
        wanted = RISE_AFTER * (1 + self.falls)
        if rise_at is None or len(self.rewards) < wanted:
            return False
        return sum(self.rewards[-wanted:]) / wanted >= rise_at

    def is_hopeless(self, family: settings.Family) -> bool:
        """Return whether the level should fall, because the last groups taught nothing."""
        is_auto = family.level == "auto"
        floor = 0 if family.level == "auto" else family.level
        if floor is None or self.level <= floor:
            return False
        if not is_auto and family.rise_at is None:
            return False
        last = self.rewards[-FALL_AFTER:]
        if len(last) < FALL_AFTER or any(self.strengths[-FALL_AFTER:]):
            return False
        return max(last) < HOPELESS

    def move(self, by: int) -> None:
        self.level += by
        self.rewards = []
        if by < 0:
            self.falls = min(MAX_FALLS, self.falls + 1)


@dataclass(frozen=True)
class _Entry:
    """A family of the settings.

    `digests`: those of the configurations that it uses: of all levels in order, or without a level
    of its plain configuration. `base`: digest of its plain configuration; `levels`: digests of all
    levels, whatever the settings name.
    """

    family: settings.Family
    digests: tuple[str, ...]
    base: str
    levels: tuple[str, ...]


_STATE = TypeAdapter(dict[str, _Standing])


class Mix:
    """See `environments.Environment`. Only `learn` and `resume` change it, and only its levels.

    Raises SettingsError for a family that is unknown or listed twice, and for an unknown level.
    """

    def __init__(
        self,
        environment: settings.Environment,
        sources: Mapping[str, Source],
    ) -> None:
        self._sources = sources
        # (family, digest) -> source, the source's name of the family, configuration
        self._known: dict[tuple[str, str], tuple[Source, str, str]] = {}
        self._entries = [self._enter(family) for family in environment.families]
        self._standings = {
            self._key(entry): _Standing(0 if entry.family.level == "auto" else entry.family.level)
            for entry in self._entries
            if entry.family.level is not None
        }
        if len({self._now(entry) for entry in self._entries}) < len(self._entries):
            raise SettingsError(
                "environment.families: a family is listed twice with the same configuration;"
                " list it once"
            )

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(sorted(source.version for source in self._sources.values()))

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self._key(entry) for entry in self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.family.name for entry in self._entries))

    @property
    def levels(self) -> dict[str, int]:
        return {
            entry.family.name: self._standings[self._key(entry)].level
            for entry in self._entries
            if entry.levels and self._key(entry) in self._standings
        }

    def sample(
        self,
        seed: int,
        count: int,
        part: int = 0,
    ) -> list[Task]:
        """Return the first `count` tasks of `seed` in a part of a round (records.Place).

        The family of each is drawn by weight; families that teach more are drawn more often. The
        tasks of a part do not depend on whether other parts were drawn.
        """
        most = MAX_PART_TASKS if part else MAX_INDEX
        if not 0 <= count <= most:
            raise SettingsError(f"tasks_per_round: got {count}; expected at most {most}")
        weights = [self._weight(entry) for entry in self._entries]
        name = f"families/{seed}/{part}" if part else f"families/{seed}"
        drawn = random.Random(name).choices(self._entries, weights=weights, k=count)
        first = part * MAX_PART_TASKS
        return [Task(*self._now(entry), seed, first + i) for i, entry in enumerate(drawn)]

    def question(self, task: Task) -> str:
        source, recipe = self._find(task)
        return source.question(recipe)

    def answer(self, task: Task) -> str | None:
        """Return one right answer; None if the family has none."""
        source, recipe = self._find(task)
        return source.answer(recipe)

    def level_of(self, task: Task) -> int | None:
        """Return the level of a task in its family's curriculum.

        None: it is at no level, or not in this mix.
        """
        for entry in self._entries:
            if entry.family.name == task.family and task.config_digest in entry.levels:
                return entry.levels.index(task.config_digest)
        return None

    def score(
        self,
        task: Task,
        completions: Sequence[str],
    ) -> list[float]:
        source, recipe = self._find(task)
        return source.score(recipe, completions)

    def tasks_of(
        self,
        family: str,
        level: int | None,
        seed: int,
        count: int,
    ) -> list[Task]:
        """Return `count` tasks of a family of the settings.

        They are at a level of its curriculum or (None) without one. Raises SettingsError for an
        unknown family or level.
        """
        entry = next((entry for entry in self._entries if entry.family.name == family), None)
        if entry is None:
            names = ", ".join(sorted({entry.family.name for entry in self._entries}))
            raise SettingsError(f"environment.families: no {family}; expected one of {names}")
        if level is not None and not 0 <= level < len(entry.levels):
            raise SettingsError(f"{family}: level {level}; expected 0 to {len(entry.levels) - 1}")
        digest = entry.base if level is None else entry.levels[level]
        return [Task(family, digest, seed, index) for index in range(count)]

    def easy_tasks(
        self,
        seed: int,
        count: int,
    ) -> list[Task]:
        """Return `count` tasks of all families in turn, each at the family's easiest level."""
        tasks = []
        for index in range(count):
            entry = self._entries[index % len(self._entries)]
            digest = entry.levels[0] if entry.levels else entry.base
            tasks.append(Task(entry.family.name, digest, seed, index))
        return tasks

    def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """Update the levels with our groups of a round.

        A level that is solved rises; one at which nothing is learned falls.
        """
        for entry in self._entries:
            standing = self._standings.get(self._key(entry))
            if standing is None:
                continue
            family, now = entry.family, self._now(entry)
            own = [group for group in groups if _key_of(group.task) == now]
            rewards = [group.mean_reward for group in own]
            standing.see(rewards, [group.signal for group in own])
            mean = sum(standing.rewards) / max(1, len(standing.rewards))
            if standing.level < len(entry.digests) - 1 and standing.is_solved(family):
                standing.move(+1)
                log.info(
                    "level risen family=%s level=%d reward_mean=%.3f",
                    family.name,
                    standing.level,
                    mean,
                )
            elif standing.is_hopeless(family):
                standing.move(-1)
                log.info(
                    "level fallen family=%s level=%d reward_mean=%.3f",
                    family.name,
                    standing.level,
                    mean,
                )

    def state(self) -> dict[str, Any]:
        return {key: asdict(standing) for key, standing in self._standings.items()}

    def resume(
        self,
        state: dict[str, Any],
    ) -> None:
        """Restore the levels of the families that are in the settings; others start as configured.

        State that can't be restored is logged, such as that of a family that is gone or has another
        configuration, or of a level that no longer exists.
        """
        try:
            standings = _STATE.validate_json(json.dumps(state), strict=True)
        except ValidationError as error:
            raise TrainingError(
                f"levels of the environment: {state}: {error.errors()[0]['msg']}"
            ) from None
        for entry in self._entries:
            key = self._key(entry)
            # 0.1.0 named an entry by its digest, which changes with every version of the
            # environment.
            name = key if key in standings else f"{entry.family.name} {entry.digests[0]}"
            found = standings.get(name)
            if (
                found is not None
                and key in self._standings
                and 0 <= found.level < len(entry.digests)
            ):
                self._standings[key] = standings.pop(name)
        for name, standing in standings.items():
            log.warning(
                "level not restored, starting as the settings say family='%s' level=%d",
                name,
                standing.level,
            )

    def _enter(self, family: settings.Family) -> _Entry:
        source_name, name = settings.split_family(family.name)
        source = self._sources[source_name]
        source.check(name, family.config)
        base, *levels = (
            self._know(source, family.name, name, config)
            for config in (family.config, *source.levels(name, family.config))
        )
        if family.level is None or (family.level == "auto" and not levels):
            return _Entry(family, (base,), base, tuple(levels))
        if family.level != "auto" and family.level >= len(levels):
            expected = (
                f"0 to {len(levels) - 1}, its curriculum's"
                if levels
                else "none: it has no curriculum"
            )
            raise SettingsError(
                f"environment.families: {family.name}: level {family.level}; expected {expected}"
            )
        return _Entry(family, tuple(levels), base, tuple(levels))

    def _know(
        self,
        source: Source,
        full_name: str,
        name: str,
        config: Config,
    ) -> str:
        digest = config_digest(source.version_of(name), name, config)
        self._known[full_name, digest] = source, name, json.dumps(config, sort_keys=True)
        return digest

    def _find(
        self,
        task: Task,
    ) -> tuple[Source, Recipe]:
        known = self._known.get(_key_of(task))
        if known is None:
            raise BadRecord(
                "unknown-task", f"task {task.family}/{task.config_digest}: not in this node's mix"
            )
        if not 0 <= task.index < MAX_INDEX:
            raise BadRecord(
                "unknown-task",
                f"task {task.family}: index {task.index} is not in 0..{MAX_INDEX - 1}",
            )
        source, name, config = known
        return source, Recipe(name, config, derived_seed(f"{task.seed}/{task.index}"))

    def _now(
        self,
        entry: _Entry,
    ) -> tuple[str, str]:
        """Return family and configuration digest of an entry's current tasks."""
        standing = self._standings.get(self._key(entry))
        return entry.family.name, entry.digests[standing.level if standing else 0]

    def _weight(self, entry: _Entry) -> float:
        """Return the weight with which a family is drawn.

        A family that seldom teaches anything is drawn rarely, but still from time to time.
        """
        standing = self._standings.get(self._key(entry))
        if standing is None or entry.family.level != "auto":
            return entry.family.weight
        # Laplace's rule of succession, so that a family without groups has weight 1/2.
        mean_signal = (sum(standing.strengths) + 1) / (len(standing.strengths) + 2)
        return entry.family.weight * mean_signal

    @staticmethod
    def _key(entry: _Entry) -> str:
        """Return the name of an entry in the state: the family with its configuration.

        It does not depend on the environment's version, so an upgrade keeps the level.
        """
        return f"{entry.family.name} {json.dumps(entry.family.config, sort_keys=True)}"


def _key_of(task: Task) -> tuple[str, str]:
    """Return family and digest, which determine how a task is made."""
    return task.family, task.config_digest


def config_digest(
    version: str,
    family: str,
    config: Config,
) -> str:
    """Return 12 hex digits, equal on two nodes exactly if a recipe makes the same task on both."""
    canonical = json.dumps([version, family, config], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]

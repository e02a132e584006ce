"""A weighted mix of families: which tasks belong to a seed, which recipes this node knows, and how hard they are.

A family of the settings stands at one level of its curriculum, or at no level. The configurations of *all* its levels
are known here, so that a peer that stands at another one is understood: its task names the configuration by digest.
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
from worker.environments import Config, Recipe, Source
from worker.errors import BadRecord, SettingsError, TrainingError
from worker.records import ScoredGroup, Task

log = logging.getLogger(__name__)

MAX_INDEX = 1 << 16
"""Tasks of one seed. Far above any round; keeps strangers' recipes in a known range."""
RISE_AFTER = 10
"""Groups at a level before it may rise. With the default mix a family has one group in a round."""


@dataclass
class _Standing:
    """Where a family's curriculum stands; `rewards`: mean rewards of our last groups at this level, the newest last."""

    level: int
    rewards: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """A family of the settings. `digests`: of its configuration alone, or, with a level, of all levels in order."""

    family: settings.Family
    digests: tuple[str, ...]


_STATE = TypeAdapter(dict[str, _Standing])


class Mix:
    """See `environments.Environment`. Only `learn` and `resume` change it, and they change nothing but the levels.

    Raises SettingsError for a family that there is not or that stands there twice, and for a level that it lacks.
    """

    def __init__(self, environment: settings.Environment, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._known: dict[tuple[str, str], tuple[Source, str, str]] = {}  # -> source, its family, configuration
        self._entries = [self._enter(family) for family in environment.families]
        self._standings = {
            self._key(entry): _Standing(entry.family.level) for entry in self._entries if entry.family.level is not None
        }
        if len({self._now(entry) for entry in self._entries}) < len(self._entries):
            raise SettingsError(
                "environment/families: a family stands there twice with one configuration; give it once"
            )

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(sorted(source.version for source in self._sources.values()))

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self._key(entry) for entry in self._entries)

    @property
    def levels(self) -> dict[str, int]:
        return {key.partition(" ")[0]: standing.level for key, standing in self._standings.items()}

    def sample(self, seed: int, count: int) -> list[Task]:
        """The first `count` tasks of `seed`; the family of each is drawn by weight."""
        if not 0 <= count <= MAX_INDEX:
            raise SettingsError(f"tasks_per_round: got {count}; expected at most {MAX_INDEX}")
        weights = [entry.family.weight for entry in self._entries]
        drawn = random.Random(f"families/{seed}").choices(self._entries, weights=weights, k=count)
        return [Task(*self._now(entry), seed, index) for index, entry in enumerate(drawn)]

    def question(self, task: Task) -> str:
        source, recipe = self._find(task)
        return source.question(recipe)

    def answer(self, task: Task) -> str | None:
        """One right answer; None for a family that names none."""
        source, recipe = self._find(task)
        return source.answer(recipe)

    def score(self, task: Task, completions: Sequence[str]) -> list[float]:
        source, recipe = self._find(task)
        return source.score(recipe, completions)

    def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """Raise the level of each family whose last RISE_AFTER groups at its level reach its `rise_at`."""
        for entry in self._entries:
            standing = self._standings.get(self._key(entry))
            if standing is None or entry.family.rise_at is None:
                continue
            now = self._now(entry)
            standing.rewards += [g.mean_reward for g in groups if (g.task.family, g.task.config_digest) == now]
            del standing.rewards[:-RISE_AFTER]
            mean = sum(standing.rewards) / RISE_AFTER
            if len(standing.rewards) < RISE_AFTER or mean < entry.family.rise_at:
                continue
            if standing.level < len(entry.digests) - 1:
                standing.level, standing.rewards = standing.level + 1, []
                log.info("level risen family=%s level=%d reward_mean=%.3f", entry.family.name, standing.level, mean)

    def state(self) -> dict[str, Any]:
        return {key: asdict(standing) for key, standing in self._standings.items()}

    def resume(self, state: dict[str, Any]) -> None:
        """Take the levels of the families that stand in the settings as they did; others begin where those say.

        What is not taken is said: a family that is gone or has another configuration, a level that there is no more.
        """
        try:
            standings = _STATE.validate_json(json.dumps(state), strict=True)
        except ValidationError as error:
            raise TrainingError(f"levels of the environment: {state}: {error.errors()[0]['msg']}") from None
        for entry in self._entries:
            key = self._key(entry)
            # 0.1.0 named an entry by its digest, which changes with every version of the environment.
            name = key if key in standings else f"{entry.family.name} {entry.digests[0]}"
            found = standings.get(name)
            if found is not None and key in self._standings and 0 <= found.level < len(entry.digests):
                self._standings[key] = standings.pop(name)
        for name, standing in standings.items():
            log.warning("level not taken over, the settings say where to begin of='%s' level=%d", name, standing.level)

    def _enter(self, family: settings.Family) -> _Entry:
        source_name, name = settings.split_family(family.name)
        source = self._sources[source_name]
        source.check(name, family.config)
        base, *levels = (
            self._know(source, family.name, name, config)
            for config in (family.config, *source.levels(name, family.config))
        )
        if family.level is None:
            return _Entry(family, (base,))
        if family.level >= len(levels):
            raise SettingsError(
                f"environment/families: {family.name}: level {family.level}; expected "
                + (f"0 to {len(levels) - 1}, its curriculum's" if levels else "none: it has no curriculum")
            )
        return _Entry(family, tuple(levels))

    def _know(self, source: Source, full_name: str, name: str, config: Config) -> str:
        digest = config_digest(source.version, name, config)
        self._known[full_name, digest] = source, name, json.dumps(config, sort_keys=True)
        return digest

    def _find(self, task: Task) -> tuple[Source, Recipe]:
        known = self._known.get((task.family, task.config_digest))
        if known is None:
            raise BadRecord("unknown-task", f"task {task.family}/{task.config_digest}: not in this node's mix")
        if not 0 <= task.index < MAX_INDEX:
            raise BadRecord("unknown-task", f"task {task.family}: index {task.index} is not in 0..{MAX_INDEX - 1}")
        source, name, config = known
        seed = int.from_bytes(hashlib.sha256(f"{task.seed}/{task.index}".encode()).digest()[:4], "big") >> 1
        return source, Recipe(name, config, seed)

    def _now(self, entry: _Entry) -> tuple[str, str]:
        """Family and configuration digest of the tasks that an entry stands for now."""
        standing = self._standings.get(self._key(entry))
        return entry.family.name, entry.digests[standing.level if standing else 0]

    @staticmethod
    def _key(entry: _Entry) -> str:
        """Names an entry in the state: its levels are those of this family with this configuration.

        Whatever the environment's version: an upgrade keeps the level.
        """
        return f"{entry.family.name} {json.dumps(entry.family.config, sort_keys=True)}"


def config_digest(version: str, family: str, config: Config) -> str:
    """12 hex digits that two nodes share if, and only if, a recipe makes the same task for both."""
    canonical = json.dumps([version, family, config], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def extract_answer(completion: str) -> str | None:
    """The text of the last <answer>…</answer>, stripped; None if there is none."""
    head, closing, _ = completion.rpartition("</answer>")
    _, opening, answer = head.rpartition("<answer>")
    return answer.strip() if closing and opening else None

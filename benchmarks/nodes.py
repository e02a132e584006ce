"""Simulated workers for the learning benchmarks: nodes without a network or a chain.

The environment, policy, sampler and trainer are real. Nodes exchange groups within the process; the
receiver regenerates the question and scores the answers again, as in the real exchange.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from worker import environments, rollouts, settings
from worker.environments import Environment
from worker.environments.answers import is_closed
from worker.node import EXTERNAL_MARGIN
from worker.policy import policy
from worker.policy.answer_length import AnswerLength
from worker.policy.prompt_forms import BY_NAME
from worker.records import Group, Rollout, ScoredGroup, round_seed
from worker.trainer.batch import choose
from worker.trainer.credit import give_credit
from worker.trainer.trainer import Trainer


@dataclass
class Node:
    """One simulated worker.

    By round: `rewards`, the mean reward of its own groups; `steps`, whether it took a training
    step; `seconds`, its processor time. `has_credit`: whether closed tags get credit
    (`give_credit`).
    """

    peer_id: str
    settings: settings.Settings
    environment: Environment
    trainer: Trainer
    rng: random.Random
    rewards: list[float] = field(default_factory=list)
    steps: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    has_credit: bool = True
    length: AnswerLength = field(default_factory=AnswerLength)

    def answer(self, round: int) -> list[ScoredGroup]:
        """Answer the first part of a round, whose mean reward is the node's reward."""
        groups = self.answer_part(round, 0)
        self.rewards.append(statistics.fmean(group.mean_reward for group in groups))
        return groups

    def answer_part(self, round: int, part: int) -> list[ScoredGroup]:
        tasks = self.environment.sample(
            round_seed(self.peer_id, round), self.settings.environment.tasks_per_round, part
        )
        policy, seed = self.trainer.policy, self.rng.getrandbits(31)
        questions, answers = rollouts.generate(
            policy, self.environment, self.length.apply(self.settings.generation), tasks, seed
        )
        groups = rollouts.score(self.environment, tasks, questions, answers).groups
        self.length.see(groups)
        return groups

    def collect(self, answered: Mapping[str, Sequence[ScoredGroup]]) -> list[ScoredGroup]:
        """Return verified groups of peers, drawn at random with the worker's margin."""
        offered = [
            (peer_id, Group(group.task, group.completions))
            for peer_id, groups in answered.items()
            if peer_id != self.peer_id
            for group in groups
        ]
        wanted = EXTERNAL_MARGIN * self.settings.trainer.external_groups
        return [
            self.verify(*offer) for offer in self.rng.sample(offered, min(wanted, len(offered)))
        ]

    def verify(self, peer_id: str, group: Group) -> ScoredGroup:
        rewards = self.environment.score(group.task, group.completions)
        scored = tuple(map(Rollout, group.completions, rewards))
        return ScoredGroup(
            group.task, self.environment.question(group.task), scored, peer_id=peer_id
        )

    def learn(self, first: list[ScoredGroup], external: list[ScoredGroup]) -> None:
        """Take a step, after further parts of the round if these groups do not teach enough."""
        local = list(first)
        for part in range(1, self.settings.node.max_parts_per_step):
            if rollouts.teach_enough((*local, *external), self.settings):
                break
            local += self.answer_part(len(self.rewards) - 1, part)
        groups = give_credit(local, is_closed) if self.has_credit else local
        batch = choose(groups, external, self.settings.trainer, self.rng, self.trainer.find_fault)
        done = self.trainer.step(batch.groups, sampled=local, collected=external)
        self.steps.append(done.skipped is None)
        self.environment.learn(local)


def make_node(seed: int, number: int, config: settings.Settings, environment: Environment) -> Node:
    peer_id = f"learning-{seed}-{number}"
    model = policy.load(config.model)
    model.adopt(config.generation)
    if config.generation.form != "auto":
        model.ask_in(BY_NAME[config.generation.form])
    trainer = Trainer(model, config.trainer, config.generation)
    return Node(peer_id, config, environment, trainer, random.Random(peer_id))


def run(
    seed: int,
    num_workers: int,
    rounds: int,
    config: settings.Settings,
    load_environment: Callable[[settings.Environment], Environment] = environments.load,
) -> list[Node]:
    nodes = [
        make_node(seed, i, config, load_environment(config.environment)) for i in range(num_workers)
    ]
    for round in range(rounds):
        exchange(nodes, round)
    return nodes


def exchange(nodes: Sequence[Node], round: int) -> None:
    """Run one round on all nodes: answer, exchange groups, learn."""
    answered = {}
    for node in nodes:
        started = time.process_time()
        answered[node.peer_id] = node.answer(round)
        node.seconds.append(time.process_time() - started)
    for node in nodes:
        started = time.process_time()
        node.learn(answered[node.peer_id], node.collect(answered))
        node.seconds[-1] += time.process_time() - started


def mean_curve(nodes: list[Node]) -> list[float]:
    return [
        statistics.fmean(rewards) for rewards in zip(*(node.rewards for node in nodes), strict=True)
    ]


def mean_seconds(nodes: list[Node]) -> list[float]:
    """Return the mean processor time of a node, by round."""
    return [
        statistics.fmean(seconds) for seconds in zip(*(node.seconds for node in nodes), strict=True)
    ]


GAIN_HEADER = f"{'seed':>4}  {'first':>6}  {'last':>6}  {'gain':>6}  {'seconds':>7}"


def print_gain(
    title: str, seed: int, curve: list[float], window: int, seconds: float
) -> tuple[float, dict[str, Any]]:
    """Print and return the gain of the last `window` rounds over the first, and its JSON claim."""
    first, last = statistics.fmean(curve[:window]), statistics.fmean(curve[-window:])
    print(f"{seed:4d}  {first:6.3f}  {last:6.3f}  {last - first:+6.3f}  {seconds:7.0f}", flush=True)
    return last - first, {
        "claim": f"{title}: mean reward of the last {window} of {len(curve)} rounds, seed {seed}",
        "ours": round(last, 4),
        "reference": round(first, 4),
        "ratio": round(last / first, 3) if first else None,
        "unit": "reward",
    }

"""Round loop: answer, share, learn, earn. The only module that knows all the parts.

A round has parts. The first one is shared and rewarded. While the chain's round is still open, the
node goes on with further parts: more tasks of its sequence, and the groups of peers that have come.
It never waits for a peer (docs/decisions/0033). A node without a chain waits for the peers of each
round, as it has no other common clock, and its rounds have one part.

The order of the writes at the end of a part makes a crash harmless: first the ledger (fsync), then
the checkpoint, then the history. A node that dies before the checkpoint repeats the part with the
same weights and seeds, publishes the same groups, and finds its reward already in the ledger. A
node that dies after the checkpoint restores the part's history line from it.
"""

import functools
import logging
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from worker import (
    __version__,
    condition,
    enrolment,
    environments,
    model_folder,
    model_setup,
    rollouts,
    vote,
)
from worker.adoption import Adoption
from worker.answer_records import AnswerRecords
from worker.chain import account_client, registration
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger
from worker.chain.settlement import Settlement
from worker.environments.answers import is_closed
from worker.errors import ChainUnreachable, TrainingError, WorkerError
from worker.held_out import HeldOut
from worker.hub.hub import Hub
from worker.market.journal import Journal
from worker.market.player import Player
from worker.policy import device, lora, model_sizing
from worker.policy.answer_length import AnswerLength
from worker.policy.choices import ChoiceScorer
from worker.records import (
    MAX_PART_TASKS,
    Collected,
    Group,
    Place,
    ScoredGroup,
    StepMetrics,
    milli_reward,
    part_seed,
    round_seed,
)
from worker.rounds import ChainClock, Clock, LocalClock, Pace, Tick
from worker.runtime import host, systemd
from worker.runtime.processes import exit_on_signals
from worker.runtime.state_dir import StateDir
from worker.settings import Settings, chain_of_node
from worker.settings import Trainer as TrainerSettings
from worker.signal_watch import SignalWatch, truncated_share
from worker.swarm import announce
from worker.swarm.exchange.verify import Verifier
from worker.swarm.identity import Identity, animal_name
from worker.swarm.swarm import Published, Swarm
from worker.telemetry import health, round_figures, status
from worker.telemetry.answer_log import AnswerLog
from worker.telemetry.gpu_watch import GpuWatch
from worker.telemetry.model_card import model_card
from worker.telemetry.status import NodeStatus, RoundRecord
from worker.telemetry.stopwatch import Stopwatch
from worker.telemetry.tracking import trackers
from worker.telemetry.tracking.run import Run
from worker.telemetry.tracking.trackers import Trackers
from worker.trainer import checkpoint
from worker.trainer.batch import choose
from worker.trainer.credit import closed_share, give_credit
from worker.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

# A clean stop waits at most this long for pending rewards to reach the chain, and for hub pushes.
# The ledger keeps the rewards that were not sent.
FLUSH_SECONDS = 30.0
# External groups requested per group trained on: groups without a signal are dropped, and a larger
# selection gives a better batch.
EXTERNAL_MARGIN = 3


@dataclass(frozen=True, slots=True)
class _Further:
    """The state of further parts in a checkpoint.

    `part`: the number of the last trained part of the round. `steps` and `groups`: how many steps
    and own groups further parts have had since the first start. `used`: for each peer id, round and
    part of its newest groups that were used.
    """

    part: int = 0
    steps: int = 0
    groups: int = 0
    used: dict[str, tuple[int, int]] = field(default_factory=dict)


_FURTHER = TypeAdapter(_Further)


def run(settings: Settings) -> None:
    """Train until `node.max_rounds`, `node.max_minutes` or a signal.

    Raises WorkerErrors; see worker.errors for their exit codes.
    """
    folder = settings.node.state_dir
    host.require_disk(folder, settings.node.min_free_disk_mb)
    host.require_port(settings.swarm.host, settings.swarm.port, "swarm.port")
    with ExitStack() as stack:
        stack.enter_context(host.lock_folder(folder, "node.state_dir"))
        stack.enter_context(_report_failure(folder))
        identity, enrolled = enrolment.load(settings)
        node = Node(settings, identity, enrolled)
        stack.callback(node.close)
        # A signal abandons the round in progress; a restart resumes from the last checkpoint.
        exit_on_signals()
        try:
            node.train()
        except RuntimeError:
            # torch also raises RuntimeError if the GPU is gone: report that instead, if so.
            node.gpu_watch.look()
            node.gpu_watch.require_healthy()
            raise


@contextmanager
def _report_failure(folder: Path) -> Iterator[None]:
    """Write the error that ends the node to status.json too; the log gets it from the caller."""
    try:
        yield
    except WorkerError as error:
        status.write_failure(folder, error)
        raise


class Node:
    """One worker: its parts and its own state."""

    def __init__(
        self, settings: Settings, identity: Identity, enrolled: enrolment.Enrolment
    ) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.peer_id = identity.peer_id
        self.folder = settings.node.state_dir
        self.files = StateDir(self.folder)
        model = model_sizing.settle(settings.model, self.folder)
        self.status = NodeStatus(
            settings.node.name, self.peer_id, animal_name(self.peer_id), model.name, __version__
        )
        self.status.write(self.folder)
        self.environment = environments.load(settings.environment)
        self.status.environments = self.environment.versions
        self.policy = model_setup.load_policy(settings)
        self.status.device = str(self.policy.model.device)
        self.gpu_watch = GpuWatch(device.gpu_uuid(self.policy.model.device))
        unused_gpus = model_sizing.count_unused_gpus(settings.model, self.status.device)
        self.status.condition.unused_gpus = unused_gpus
        self.trainer = Trainer(self.policy, self._method(), settings.generation)
        self.last_record: dict[str, Any] | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=health.KEPT_ROUNDS)
        self.stopwatch = Stopwatch()
        self.rounds_unsaved = 0
        self.used: dict[str, Place] = {}  # for each peer, the newest place whose groups were used
        self.last = self._resume()
        # Prepare generation first: it stays in memory, and training measures what is left.
        questions = [self.environment.question(task) for task in self.environment.sample(0, 3)]
        self.policy.prepare(settings.generation, self.files.rows, questions)
        model_setup.settle_form(self.policy, self.environment, settings.generation, self.folder)
        self.status.form = self.policy.form.name
        self.trainer.fit(self.files.budget, was_killed=self.files.memory_killed.exists())
        self.files.memory_killed.unlink(missing_ok=True)
        self.hub = self._hub() if settings.hub.token_file is not None else None
        self.answers = self._answers()
        self.signal_watch = SignalWatch(self.policy, settings.generation)
        self.trackers = self._open_trackers()
        self.answer_length = AnswerLength()
        self.held_out = HeldOut(settings, self.policy, self.environment, self.status)
        self.ledger = Ledger(self.files.ledger)
        self.swarm = self._swarm() if settings.swarm.enabled else None
        self.adoption = self._adoption(self.swarm) if settings.swarm.shares_weights else None
        self.coordinator: Coordinator | None = None
        self.settlement: Settlement | None = None
        self.account: account_client.Account | None = None
        self.clock: Clock = LocalClock()
        self.pace = Pace()
        if enrolled.registered:
            self.coordinator = Coordinator(chain_of_node(settings.chain, self.folder))
            self.account = registration.open_account(settings.chain, self.folder)
            self.settlement = Settlement(
                self.ledger, self.coordinator, self.account, settings.chain
            )
            self.clock = ChainClock(self.coordinator, settings.chain.poll_seconds)
            self.status.chain = "unknown"
        self.player = self._player()

    def train(self) -> None:
        """Run the round loop until `node.max_rounds` or `node.max_minutes`.

        Earned rewards are settled before it returns, if the chain can be reached.
        """
        self._ask_chain_for_peers()  # before start(), which chooses a relay
        if self.swarm is not None:
            self.swarm.start()
        if self.settlement is not None:
            self.settlement.start()
        if self.player is not None:
            self.player.start()
        systemd.ready()
        logger.info(
            "training peer_id=%s name='%s' model=%s",
            self.peer_id,
            self.status.animal_name,
            self.status.model,
        )
        while not self._finished():
            self.gpu_watch.require_healthy()
            self._evaluate_if_due()
            tick = self._next_round()
            if tick is None:
                self._practise()
            else:
                self._train_part(tick)
        self._evaluate_if_due()
        self._leave()

    def close(self) -> None:
        """Stop the swarm, chain and hub threads; earned rewards are already in the ledger."""
        systemd.stopping("closing")
        if self.settlement is not None:
            self.settlement.close()
        if self.player is not None:
            self.player.close()
        if self.swarm is not None:
            self.swarm.close()
        if self.hub is not None:
            self.hub.close()
        self.trackers.close()
        self.gpu_watch.close()
        self._show("stopped", state="stopped")

    def _method(self) -> TrainerSettings:
        """Return the training settings with every open choice decided."""
        trainer = model_setup.settle_method(self.policy, self.settings.trainer, self.folder)
        self.settings = self.settings.model_copy(update={"trainer": trainer})
        logger.info(
            "method lora=%s learning_rate=%g",
            "none" if trainer.lora is None else trainer.lora,
            trainer.learning_rate,
        )
        return trainer

    def _part_of(self, tick: Tick) -> int:
        """Return the number of the part of the tick's round that is trained next."""
        return self.last.part + 1 if tick.round == self.last.round else 0

    def _train_part(self, tick: Tick) -> None:
        """Run one part of a round; without a chain a round has only one.

        Share our own groups, then learn from them and from the groups of peers.
        """
        started = time.monotonic()
        place = Place(tick.round, self._part_of(tick))
        self.status.round = tick.round
        self._ask(tick.round)
        first, tokens_per_second = self._answer_place(place)
        if place.part:
            self._check_still_open()
        published = self._publish(place, first)
        collected = self._collect(place)
        local, collected, num_parts = self._answer_until_enough(place, first, collected)
        if self.adoption is not None and place.part == 0:
            self.adoption.before_step(local, collected.groups)
        self._show("training")
        self.stopwatch.begin("training")
        further = f"/{place.part}" if place.part else ""
        rng = random.Random(f"{self.settings.node.seed}/{self.peer_id}/{tick.round}{further}")
        batch = choose(
            give_credit(local, is_closed),
            collected.groups,
            self.settings.trainer,
            rng,
            self.trainer.find_fault,
        )
        metrics = self.trainer.step(batch.groups, sampled=local, collected=collected.groups)
        if self.swarm is not None and (planters := +self.trainer.planters()):
            self.swarm.note_planted(planters)
        self.signal_watch.see(metrics, local)
        self.environment.learn(local)
        record = replace(
            self._record_of(place, first, local, collected, metrics),
            parts=num_parts,
            groups_dropped=batch.dropped,
            tokens_per_second=tokens_per_second,
            seconds=time.monotonic() - started,
            seconds_by=self.stopwatch.take(),
        )
        self.stopwatch.begin("saving")
        if place.part == 0:
            groups = [*local, *collected.groups]
            self.answers.write(tick.round, groups, self.trainer.learned)
        if record.skipped is None:
            self._count_step(place.part)
        if place.part == 0:
            self._earn(tick, first, published, collected.groups)
        self.status.extra_groups += len(local) - (0 if place.part else len(first))
        if self.adoption is not None and place.part == 0:
            self.stopwatch.begin("evaluating")
            self.adoption.after_step()
            self.status.weights = dict(self.adoption.counts)
            self.stopwatch.begin("saving")
        self._save_part(record)
        self.pace.finish(place.part, record.seconds)

    def _record_of(
        self,
        place: Place,
        first: Sequence[ScoredGroup],
        local: Sequence[ScoredGroup],
        collected: Collected,
        metrics: StepMetrics,
    ) -> RoundRecord:
        """Return the history line of a step, without the figures that only the loop knows.

        `first` are our groups of `place`; `local` are all our groups of the step.
        """
        return RoundRecord(
            round=place.round,
            part=place.part,
            finished_at=time.time(),
            reward_mean=_mean([group.mean_reward for group in first]),
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            peers_heard=collected.heard,
            groups_local=metrics.num_groups_local,
            groups_external=metrics.num_groups_external,
            groups_rejected=collected.rejected,
            groups_dropped={},
            tokens_per_second=0.0,
            seconds=0.0,
            skipped=metrics.skipped,
            quality=asdict(metrics.quality),
            closed=closed_share(local, is_closed),
            truncated=truncated_share(local, self.settings.generation.max_completion_length),
            seconds_waiting=collected.seconds_waiting,
            learning_rate=metrics.learning_rate,
            external_share=metrics.external_share,
            families=round_figures.by_family(local, self.environment.level_of),
            held_out=self.status.held_out_now,
            behind=collected.behind,
        )

    def _evaluate_if_due(self) -> None:
        if self.held_out.is_due():
            self.stopwatch.begin("evaluating")
            self.held_out.evaluate(progress=lambda: self._show("evaluating"))

    def _count_step(self, part: int) -> None:
        if part:
            self.status.extra_steps += 1
        else:
            self.status.rounds_trained += 1

    def _earn(
        self,
        tick: Tick,
        local: Sequence[ScoredGroup],
        published: Published | None,
        external: Sequence[ScoredGroup],
    ) -> None:
        """Record the round's reward and our vote in the ledger, from the first part of the round.

        The reward is for the answers, so it is recorded even if no training step was taken (a node
        that solved all tasks, or none, learns nothing from them). Otherwise the other nodes would
        wait for this node's report until the end of the round. Only groups that we published earn a
        reward, because auditors can check only those.
        """
        if self.settlement is None:
            return
        if published is not None:
            local = [
                group for group in local if Group(group.task, group.completions) in published.groups
            ]
            if not local:
                logger.warning(
                    "no reward round=%d reason=none of our groups fits into a message; lower"
                    " generation.num_generations or generation.max_completion_length",
                    tick.round,
                )
                return
        reward = milli_reward([group.mean_reward for group in local])
        winners = vote.winners(self.peer_id, local, external)
        digest = None if published is None else published.digest
        if not self.ledger.record(tick.round, tick.stage, self.peer_id, reward, winners, digest):
            logger.warning(
                "round re-run gave a different reward; keeping the one recorded first round=%d",
                tick.round,
            )
        self.settlement.wake()

    def _save_part(self, record: RoundRecord) -> None:
        """Save the part: the checkpoint, then the history; the ledger is written before both."""
        last_part = record.part + record.parts - 1
        self.last, self.last_record = Place(record.round, last_part), asdict(record)
        self.rounds_unsaved += 1
        self.status.levels = self.environment.levels
        saved = None
        if self.rounds_unsaved >= self.settings.node.checkpoint_every or self._finished():
            saved = self._checkpoint()
        record.append(self.folder)
        if record.part == 0:  # trackers count by rounds
            self.trackers.log(record)
        self._see_round(self.last_record)
        self.recent.append(self.last_record)
        if (
            self.hub is not None
            and saved is not None
            and record.part == 0
            and self.hub.is_due(self.status.rounds_trained)
        ):
            weights = saved / "model.safetensors" if self._is_whole_model else None
            self.hub.push(self.status.rounds_trained, record.round, weights, self._describe_model)
        self._show("round finished")
        logger.info(
            "round finished round=%d part=%d reward_mean=%.3f loss=%.4f peers_heard=%d"
            " groups_local=%d groups_external=%d rejected=%d tokens_per_second=%.0f seconds=%.1f"
            " waiting=%.1f"
            " state=%s skipped=%s",
            record.round,
            record.part,
            record.reward_mean,
            record.loss,
            len(record.peers_heard),
            record.groups_local,
            record.groups_external,
            sum(record.groups_rejected.values()),
            record.tokens_per_second,
            record.seconds,
            record.seconds_waiting,
            self.status.state,
            record.skipped,
        )

    def _see_round(self, record: dict[str, Any]) -> None:
        """Copy the figures of the last round, possibly from before a restart, to the status."""
        for name in ("reward_mean", "loss", "groups_local", "groups_external", "tokens_per_second"):
            setattr(self.status, name, record[name])
        self.status.last_round = status.as_record(record)
        self.status.closed, self.status.truncated = record.get("closed"), record.get("truncated")
        self.status.round_seconds, self.status.waiting_seconds = (
            record["seconds"],
            record.get("seconds_waiting"),
        )

    def _practise(self) -> None:
        """Take one training step on our own answers while the chain is unreachable.

        Without the chain the round is unknown, so the step earns nothing.
        """
        self.status.practice_steps += 1
        self.status.state = "training-alone"
        seed = round_seed(f"{self.peer_id}/practice", self.status.practice_steps)
        local, tokens_per_second = self._answer(seed, 0, seed)
        self._show("training")
        self.stopwatch.begin("training")
        rng = random.Random(f"{self.peer_id}/practice/{self.status.practice_steps}")
        batch = choose(
            give_credit(local, is_closed), (), self.settings.trainer, rng, self.trainer.find_fault
        )
        metrics = self.trainer.step(batch.groups, sampled=local)
        self.environment.learn(local)
        self.status.loss, self.status.tokens_per_second = metrics.loss, tokens_per_second
        self.recent.append(
            {"quality": asdict(metrics.quality), "closed": closed_share(local, is_closed)}
        )
        if self.status.practice_steps % self.settings.node.checkpoint_every == 0:
            self._checkpoint()
        reward = _mean([group.mean_reward for group in local])
        logger.info(
            "practice step step=%d reward_mean=%.3f loss=%.4f",
            self.status.practice_steps,
            reward,
            metrics.loss,
        )

    def _answer(
        self,
        seed: int,
        part: int,
        sampling_seed: int,
    ) -> tuple[list[ScoredGroup], float]:
        """Answer a part of the tasks of `seed`.

        Returns our scored groups and the generation speed in tokens per second.
        """
        self._show("generating")
        self.stopwatch.begin("generating")
        wanted = self.settings.environment.tasks_per_round
        tasks = self.environment.sample(seed, min(wanted, MAX_PART_TASKS) if part else wanted, part)
        started = time.monotonic()
        questions, answers = rollouts.generate(
            self.policy,
            self.environment,
            self.answer_length.apply(self.settings.generation),
            tasks,
            sampling_seed ^ self.settings.node.seed,
        )
        seconds = time.monotonic() - started
        self.stopwatch.begin("scoring")
        answered = rollouts.score(self.environment, tasks, questions, answers)
        if answered.num_too_long:
            limit = self.settings.generation.max_prompt_length
            logger.warning(
                "tasks left out, their prompts are too long num=%d limit=%d"
                " (generation.max_prompt_length)",
                answered.num_too_long,
                limit,
            )
            if not answered.groups:
                raise TrainingError(
                    f"all {len(tasks)} prompts are longer than {limit} tokens"
                    " (generation.max_prompt_length); raise it, or choose other families"
                    " (environment.families)"
                )
        self.answer_length.see(answered.groups)
        return answered.groups, answered.num_tokens / seconds

    def _answer_place(self, place: Place) -> tuple[list[ScoredGroup], float]:
        seed = round_seed(self.peer_id, place.round)
        return self._answer(seed, place.part, part_seed(self.peer_id, place))

    def _answer_until_enough(
        self, place: Place, first: Sequence[ScoredGroup], collected: Collected
    ) -> tuple[list[ScoredGroup], Collected, int]:
        """Answer and publish further parts until the step has enough groups that teach.

        Groups of peers count too, including those that arrive meanwhile. Groups of peers that
        planted text last time do not count, because most of their text is not learned from.
        Returns our groups (beginning with `first`, those of `place`), all groups of peers, and the
        number of parts.
        """
        groups = list(first)
        node = self.settings.node
        most = min(node.max_parts_per_step, node.max_parts_per_round - place.part)
        for num_parts in range(1, most):
            trusted = filter(self.trainer.trusts, collected.groups)
            if rollouts.teach_enough((*groups, *trusted), self.settings):
                return groups, collected, num_parts
            further = Place(place.round, place.part + num_parts)
            self._ask(further.round)
            answered, _ = self._answer_place(further)
            self._publish(further, answered)
            groups += answered
            if self._has_chain:  # otherwise peers were not asked for more
                collected = collected.plus(self._collect(further))
        return groups, collected, max(1, most)

    def _publish(
        self,
        place: Place,
        local: Sequence[ScoredGroup],
    ) -> Published | None:
        """Start serving our groups of this part to peers; return None if the swarm is disabled."""
        self.stopwatch.begin("exchanging")
        if self.swarm is None:
            return None
        # If they do not all fit into a message, groups with a signal go first.
        useful_first = sorted(local, key=lambda group: -group.signal)
        groups = [Group(group.task, group.completions) for group in useful_first]
        return self.swarm.publish(place.round, groups, place.part)

    @property
    def _has_chain(self) -> bool:
        return isinstance(self.clock, ChainClock)

    @property
    def _num_wanted(self) -> int:
        """The number of groups to get from peers."""
        return EXTERNAL_MARGIN * self.settings.trainer.external_groups

    def _ask(self, round: int) -> None:
        """Ask peers for groups, which arrive while we answer our own tasks."""
        if self.swarm is not None and self._has_chain:
            self.swarm.ask(round, self._num_wanted)

    def _collect(self, place: Place) -> Collected:
        """Return the groups that have arrived; without a chain, wait for this round's first."""
        if self.swarm is None:
            self.status.state = "training-alone"
            return Collected()
        self._show("collecting")
        if self._has_chain:
            collected = self.swarm.take(place.round)
            self.used = self.swarm.used
        else:
            collected = self.swarm.collect(place.round, self._num_wanted)
        for behind, count in collected.behind.items():
            known = self.status.groups_behind
            known[behind] = known.get(behind, 0) + count
        self.stopwatch.move(collected.seconds_waiting, "exchanging", "waiting")
        swarm = self.swarm.status()
        self.status.state, self.status.last_error = swarm.state, swarm.last_error
        self.status.peers_heard = len(collected.heard)
        return collected

    def _next_round(self) -> Tick | None:
        """Wait for the round to train now and return it.

        It is the last round again if that is still open and may have a further part. None: the
        round is unknown, because the chain is unreachable.
        """
        self._show("waiting for the next round")
        self.stopwatch.begin("waiting")
        if self.player is not None:
            self.player.think(lambda: self.choice_scorer)
        deadline, part = None, self.last.part + 1
        if part < self.settings.node.max_parts_per_round:
            deadline = time.monotonic() + self.pace.patience()
        tick = self.clock.next(self.last.round, waiting=self._wait, deadline=deadline)
        self._see_chain()
        if tick is not None and self._part_of(tick) == 0:
            self._ask_chain_for_peers()
        return tick

    def _ask_chain_for_peers(self) -> None:
        """Read the bootnodes from the chain and join the swarm through them.

        With `swarm.only_registered`, also read which of the known peers are registered.
        """
        if self.swarm is None or self.coordinator is None:
            return
        try:
            self.swarm.join_through(self.coordinator.bootnodes())
            if self.settings.swarm.only_registered:
                self.swarm.allow_registered(self.coordinator.registered(self.swarm.peers()))
        except ChainUnreachable as error:
            logger.warning(
                "chain unreachable, using the bootnodes and peers known before error=%s", error
            )

    def _check_still_open(self) -> None:
        """Read the chain in the middle of a further part, to measure how long rounds stay open."""
        self.clock.next(self.last.round, waiting=self.pace.see_open, deadline=0.0)

    def _wait(self) -> None:
        """Note that the chain was read and its round is still the last one."""
        self.pace.see_open()
        self._see_chain()
        if self.player is not None:
            self.player.think(lambda: self.choice_scorer)
        self._show(self.status.activity)

    def _see_chain(self) -> None:
        if isinstance(self.clock, ChainClock):
            self.status.chain = "ok" if self.clock.reachable else "unreachable"

    def _leave(self) -> None:
        """Finish after the last trained round.

        Settle the earned rewards and bets, finish the hub pushes, and serve the round's groups to
        peers that are still collecting.
        """
        self._show("leaving")
        deadline = time.monotonic() + self.settings.swarm.collect_timeout_seconds
        if self.settlement is not None:
            self.settlement.flush(FLUSH_SECONDS)
        if self.hub is not None:
            self.hub.flush(FLUSH_SECONDS)
        if self.player is not None:
            self._show("waiting for the result of its bets")
            self.player.flush(FLUSH_SECONDS)
        if self.coordinator is not None:
            self.clock.next(self.last.round, waiting=self._wait, deadline=deadline)
            self._see_chain()
        logger.info("finished rounds_trained=%d", self.status.rounds_trained)

    def _show(
        self,
        activity: str,
        state: str | None = None,
    ) -> None:
        """Report progress to the watchdog and in status.json."""
        self.status.activity = activity
        if state == "stopped":
            self.status.state = "stopped"
        if self.settlement is not None:
            settled = self.settlement.status()
            self.status.ledger = {
                name: getattr(settled, name) for name in ("earned", "sent", "confirmed", "rejected")
            }
            self.status.ledger["held-back"] = settled.held_back
            self.status.ledger_error = settled.last_error
        if self.swarm is not None:
            self.status.swarm = self.swarm.status()
        if self.hub is not None:
            self.status.hub = self.hub.status()
        if self.player is not None:
            self.status.market = self.player.status()
            self.status.market_brier = self.player.calibration()
        self._see_condition()
        self.status.write(self.folder)
        systemd.progress(f"{activity}, round {self.status.round}, {self.status.state}")

    def _see_condition(self) -> None:
        """Measure the figures that determine the node's health; warn if it got worse."""
        found = self.status.condition
        condition.see_policy(found, self.policy)
        condition.see_budget(found, self.trainer.budget)
        found.gpu = self.gpu_watch.card
        condition.see_host(found, self.settings.node)
        if isinstance(self.account, account_client.AccountClient):
            found.clock_offset = self.account.clock_offset
        found.recent = health.recent(self.recent)
        health.watch(self.status)

    def _finished(self) -> bool:
        rounds, minutes = self.settings.node.max_rounds, self.settings.node.max_minutes
        if minutes is not None and time.monotonic() - self.started >= 60 * minutes:
            return True
        return rounds is not None and self.status.rounds_trained >= rounds

    def _resume(self) -> Place:
        """Restore the newest checkpoint and return its place; round -1 if there is none."""
        state = checkpoint.restore(self.files.checkpoints, self.trainer)
        if state is None:
            return Place(-1, 0)
        numbers = [
            n
            for name in ("round", "rounds_trained", "practice_steps")
            if type(n := state.get(name)) is int
        ]
        self.last_record = state.get("record")
        try:
            if len(numbers) < 3:
                raise ValueError(
                    "expected whole numbers for round, rounds_trained and practice_steps"
                )
            # Earlier versions had rounds of one part.
            further = _FURTHER.validate_python(state.get("further", {}))
            if self.last_record is not None:
                status.complete_rounds(self.folder, self.last_record)
        except ValueError as error:
            raise TrainingError(
                f"checkpoint in {self.folder / 'checkpoints'}: invalid state {state}: {error}; "
                "move this checkpoint away to resume from the one before"
            ) from None
        self.status.round, self.status.rounds_trained, self.status.practice_steps = numbers
        self.status.extra_steps, self.status.extra_groups = further.steps, further.groups
        self.used = {peer: Place(*place) for peer, place in further.used.items()}
        self.recent.extend(status.read_parts(self.folder))
        for record in [*self.recent][-1:]:
            self._see_round(record)
        self.environment.resume(state.get("environment", {}))
        self.status.levels = self.environment.levels
        logger.info(
            "resumed round=%d rounds_trained=%d", self.status.round, self.status.rounds_trained
        )
        return Place(numbers[0], further.part)

    def _answers(self) -> AnswerRecords:
        node = self.settings.node
        log = AnswerLog(self.folder, node.answers_rounds, node.answers_mb)
        return AnswerRecords(log, self.environment, self.policy)

    def _open_trackers(self) -> Trackers:
        shown = self.settings.model_dump(mode="json", exclude={"chain", "account", "hub"})
        name, folder = self.settings.node.name, self.files.logs
        return trackers.open_all(self.settings.tracking, Run(self.peer_id, name, folder, shown))

    def _hub(self) -> Hub:
        model, animal = self.policy.name.rpartition("/")[2], self.status.animal_name
        name = f"{model}-hivewright-{animal.replace(' ', '-')}"
        return Hub(self.settings.hub, self.folder, name, self.status.rounds_trained)

    @property
    def _is_whole_model(self) -> bool:
        """Return whether a checkpoint's weights are the complete model.

        If not, a push merges the adapters and adds the buffers.
        """
        model = self.policy.model
        return self.trainer.lora is None and not lora.has_more_than_parameters(model)

    def _describe_model(self, folder: Path) -> None:
        """Write the model card and the files that transformers needs to load the weights.

        Also write the weights, unless a checkpoint's weights are the complete model.
        """
        card = model_card(self.settings, self.status, status.read_rounds(self.folder))
        model_folder.describe(self.policy, card, folder)
        if not self._is_whole_model:
            lora.save_merged(self.policy.model, folder / model_folder.WEIGHTS)

    def _checkpoint(self) -> Path | None:
        """Save a checkpoint and return its path; return None if the model's outputs are not finite.

        Broken weights must not displace earlier checkpoints that are intact.
        """
        if not self.trainer.is_sound():
            logger.warning(
                "skipping checkpoint: model outputs are not finite; earlier checkpoints are kept"
            )
            return None
        self.rounds_unsaved = 0
        saved = checkpoint.save(
            self.files.checkpoints,
            self.trainer,
            {
                "round": self.last.round,
                "further": asdict(self._further()),
                "record": self.last_record,
                "rounds_trained": self.status.rounds_trained,
                "practice_steps": self.status.practice_steps,
                "environment": self.environment.state(),
            },
            keep=self.settings.node.keep_checkpoints,
        )
        if self.adoption is not None:
            self.adoption.offer(saved / model_folder.WEIGHTS, self.status.rounds_trained)
        return saved

    def _adoption(self, swarm: Swarm | None) -> Adoption | None:
        """Return the exchange of weights with peers; None without a swarm."""
        if swarm is None:
            return None
        return Adoption(
            swarm,
            self.trainer,
            self.environment,
            self.settings.generation,
            self.folder,
            progress=lambda: self._show("trying weights"),
        )

    def _player(self) -> Player | None:
        """Return the node's player in the prediction market.

        None without a chain or an account, or if `market.enabled` is false.
        """
        market = self.settings.market
        if market.enabled is False:
            logger.info("not taking part in the prediction market: market.enabled is false")
            return None
        if self.coordinator is None or self.account is None:
            return None
        journal = Journal(self.files.bets)
        record_file = market.record_file or self.files.market_record
        return Player(market, self.peer_id, self.coordinator, self.account, journal, record_file)

    @functools.cached_property
    def choice_scorer(self) -> ChoiceScorer:
        return ChoiceScorer(
            self.policy, self.settings.generation, lambda: self.trainer.budget.tokens
        )

    def _swarm(self) -> Swarm:
        verifier = Verifier(self.environment, self.settings.swarm, max_group_size=256)
        announced = announce.with_interface_address(self.settings.swarm)
        swarm = Swarm(announced, self.files.identity, self.folder, verifier)
        swarm.resume(self.used)
        return swarm

    def _further(self) -> _Further:
        used = {peer: (place.round, place.part) for peer, place in self.used.items()}
        return _Further(self.last.part, self.status.extra_steps, self.status.extra_groups, used)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

# ruff: noqa: N806 - tensors are named with their axes
"""Train the policy by GRPO steps on batches of the node's own groups and of peers' groups.

A peer's text is tokenised here and treated as if this node's policy had sampled it (SAPO). With
`trainer.external_completions` "better", only those completions of a peer's group are learned from
whose reward is above the group's mean (docs/decisions/0008). The old log-probabilities are the
detached ones of the first pass over the batch, so they do not need a forward pass of their own. A
batch is split into micro-batches by a token budget. The weights of tokens in the loss are computed
before the split, so it changes the use of memory, but not the loss.
"""

# M completion tokens of a micro-batch, the completions concatenated; T tokens of one completion

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path

import torch
from torch import Tensor

from worker import settings
from worker.errors import ModelError, ResourceError, TrainingError
from worker.policy import lora, memory
from worker.policy.logprobs import PromptGroup, Scorer
from worker.policy.memory_shortage import Shortage
from worker.policy.policy import Policy
from worker.records import ScoredGroup, StepMetrics, StepQuality
from worker.trainer import micro_batch, peer_text, quality
from worker.trainer.grpo import group_advantages, sampling_ratios, sequence_weights, token_losses
from worker.trainer.lesson import Lesson, most_different

log = logging.getLogger(__name__)

_MORE_TOKENS = 4
"""Number of tokens by which a peer's answer, encoded here, may exceed the limit.

Encoding a text may give more tokens than were sampled.
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """The result of one pass over a whole batch.

    `clipped_low` and `clipped_high` are the shares of tokens whose ratio was clipped at the lower
    and at the upper bound. `entropy` is NaN if it was not measured.
    """

    loss: float
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    entropy: float = math.nan


@dataclass(frozen=True, slots=True)
class Learned:
    """The effect of a step on one group, with one value per completion.

    `advantages` are 0 for completions that were not learned from. `logprobs` are the means of the
    tokens' log-probabilities under the policy before the step; None: not computed. `planted`:
    whether each has text that its peer repeats and that is improbable under this policy
    (`peer_text.is_planted`).
    """

    group: ScoredGroup
    advantages: tuple[float, ...]
    logprobs: tuple[float | None, ...]
    planted: tuple[bool, ...]


class Trainer:
    """Trains `policy` in place.

    A checkpoint needs `parameters`, `optimizer`, `masters`, `steps` and `nonfinite_steps`.
    `parameters` are the trained weights of the policy by name: all of them, or with `trainer.lora`
    the adapters. `origin` identifies the model that the training started from, because two models
    may have weights of the same shapes. `masters` are float32 copies of the parameters, or the
    parameters themselves if these are float32. `learned` is the result of the last step, empty if
    that was skipped.
    """

    def __init__(
        self, policy: Policy, trainer: settings.Trainer, generation: settings.Generation
    ) -> None:
        self.policy = policy
        parameters = policy.model.num_parameters()
        trainer = trainer.settle(parameters)
        self.lora = trainer.lora_for(parameters)
        self.steps = 0
        self.nonfinite_steps = 0
        self.learned: tuple[Learned, ...] = ()
        self.budget = micro_batch.Budget(trainer.max_tokens_per_micro_batch)
        self._peer_texts = peer_text.PeerTexts()
        self._shortage = Shortage(policy.model.device)
        self._budget_file: Path | None = None
        self._budget_key = ""
        self._settings = trainer
        self._num_iterations = trainer.num_iterations or 1
        self._generation = generation
        self.origin: dict[str, str | int] = {"model": policy.name}
        if self.lora is not None:
            lora.attach(policy.model, self.lora)
            self.origin |= {
                "lora_alpha": self.lora.alpha,
                "base_weights": lora.fingerprint(policy.model),
            }
        self._scorer = Scorer(policy.model)
        self._reference = self._make_reference()
        self.parameters = {
            name: p for name, p in policy.model.named_parameters() if p.requires_grad
        }
        # An update of 1e-6 is lost in bfloat16, so the optimizer updates float32 masters of such
        # weights.
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters.values()
        ]
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(_Collect(master))
        matrices = [m for m in self.masters if m.ndim >= 2]
        vectors = [m for m in self.masters if m.ndim < 2]  # norms and biases: no decay, as in TRL
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": trainer.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=_scheduled_rate(trainer, 0),
            betas=(trainer.adam_beta1, trainer.adam_beta2),
            eps=trainer.adam_epsilon,
            fused=True,
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step.

        It is a function of the number of steps, so a checkpoint does not contain a scheduler.
        """
        return _scheduled_rate(self._settings, self.steps)

    def step(
        self,
        groups: Sequence[ScoredGroup],
        sampled: Sequence[ScoredGroup] = (),
        collected: Sequence[ScoredGroup] = (),
    ) -> StepMetrics:
        """Learn from `groups` by `num_iterations` optimizer steps.

        `groups` must be without a fault (`find_fault`). `sampled` are all groups that the policy
        has sampled since the last step, and `collected` all those of peers that came since then,
        also without a signal; none: those in `groups`. If the
        loss, a gradient or a log-probability in `sampled` is not finite, the step is skipped and
        the weights do not change. `sampled` is checked because the answers of broken weights have
        no signal, so no loss would show the fault. Raises TrainingError after `max_nonfinite_steps`
        such steps in a row, and ResourceError if a single sequence does not fit into memory.
        """
        self.learned = ()
        if not _has_finite_logprobs(sampled):
            self._skip_step("log-probabilities of answers that are not finite")
            return self._metrics([], 0, sampled, skipped="non-finite")
        lessons = [(group, self._read(group)) for group in groups]
        self._hide_surplus(lessons)
        self._mark_repeated(lessons, sampled, collected or groups)
        batch = list(chain.from_iterable(sequences for _, sequences in lessons))
        self._weigh(batch)
        batch = [sequence for sequence in batch if self._teaches(sequence)]
        if not batch:
            return self._metrics([], 0, sampled, skipped="no-signal")
        self._shortage.look()
        self._raise_budget()
        grad_norm = rate = 0.0
        done = Pass(0.0)
        skipped: str | None = None
        for iteration in range(self._num_iterations):
            rate = self.learning_rate
            done = self._backward(batch, is_first=iteration == 0)
            grad_norm = float(
                torch.nn.utils.clip_grad_norm_(self.masters, self._settings.max_grad_norm)
            )
            if not (math.isfinite(done.loss) and math.isfinite(grad_norm)):
                self._skip_step(f"loss {done.loss}, gradient norm {grad_norm}")
                skipped = "non-finite"
                break
            self._update(rate)
        else:
            self.nonfinite_steps = 0
        self._release_memory()
        num_tokens = sum(len(s.token_ids) for s in batch)
        self.learned = tuple(_note_learned(*pair) for pair in lessons) if skipped is None else ()
        for peer_id, has_planted in self.planters().items():
            self._peer_texts.note(peer_id, has_planted > 0)
        figures = self._sampling_figures(batch)
        return self._metrics(
            groups, num_tokens, sampled or groups, done, grad_norm, rate, skipped, figures
        )

    def _teaches(self, sequence: Lesson) -> bool:
        """Return whether a completion contributes to the gradient.

        If its advantage is 0, it contributes only through the KL term.
        """
        return sequence.weight > 0 and (sequence.advantage != 0 or self._settings.beta > 0)

    def _sampling_figures(
        self,
        batch: Sequence[Lesson],
    ) -> dict[str, float]:
        compared = [
            quality.Compared(s.old_logprobs, s.sampler_logprobs, s.ratios)
            for s in batch
            if s.old_logprobs is not None
            and s.sampler_logprobs is not None
            and s.ratios is not None
        ]
        is_by_sequence = self._settings.importance_sampling_mode in (
            "sequence_mask",
            "sequence_truncate",
        )
        return quality.of_sampling(compared, is_by_sequence)

    def _read(self, group: ScoredGroup) -> list[Lesson]:
        """Return the group's completions as token ids, each with its advantage."""
        sequences = []
        advantages = _advantages(group, self._settings.scale_rewards)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            if rollout.sampled is None:
                ids, truncated = self.policy.completion_ids(
                    rollout.text, self._generation.max_completion_length
                )
            else:
                ids, truncated = list(rollout.sampled.token_ids), rollout.sampled.truncated
            is_hidden = truncated and self._settings.mask_truncated_completions
            # This policy would hardly make a peer's mistake, so making the mistake less likely
            # changes the policy without a benefit.
            is_hidden |= (
                group.peer_id is not None
                and advantage < 0
                and self._settings.external_completions == "better"
            )
            prompt = self.policy.prompt_ids(group.question, rollout.text)
            lesson = Lesson(tuple(prompt), tuple(ids), advantage, is_hidden, group.peer_id)
            if rollout.sampled is not None and rollout.sampled.logprobs:
                lesson.sampler_logprobs = torch.tensor(
                    rollout.sampled.logprobs, dtype=torch.float32, device=self.policy.model.device
                )
            sequences.append(lesson)
        return sequences

    def _hide_surplus(self, lessons: Sequence[tuple[ScoredGroup, list[Lesson]]]) -> None:
        """Hide completions until at most `max_completions` are not hidden."""
        usable = [
            [i for i, sequence in enumerate(sequences) if not sequence.is_hidden]
            for _, sequences in lessons
        ]
        groups = [group for group, _ in lessons]
        kept = most_different(groups, usable, self._settings.max_completions)
        for (_, sequences), positions in zip(lessons, kept, strict=True):
            for position, sequence in enumerate(sequences):
                sequence.is_hidden |= position not in positions

    def find_fault(self, group: ScoredGroup) -> str | None:
        """Return the reason, as a short name, why a group can't be learned from; None: it can."""
        if len(group.rollouts) < 2:
            return "too-small"
        if not all(completion.token_ids for completion in group.sampled):
            return "empty"
        if any(
            len(completion.logprobs) not in (0, len(completion.token_ids))
            for completion in group.sampled
        ):
            return "ragged"
        if not all(math.isfinite(reward) for reward in group.rewards):
            return "non-finite-reward"
        if not group.teaches:
            return "no-signal"
        prompt_length = len(self.policy.prompt_ids(group.question))
        if not 0 < prompt_length <= self._generation.max_prompt_length:
            return "prompt-length"
        return "over-long" if self._is_over_long(group) else None

    def _is_over_long(self, group: ScoredGroup) -> bool:
        """Return whether an answer is longer than `generation.max_completion_length`.

        Of a peer's group only the answers with more than the mean reward are checked. They are cut
        off at the limit, so the text that earned the reward may be lost.
        """
        limit = self._generation.max_completion_length
        if group.sampled:
            return any(len(completion.token_ids) > limit for completion in group.sampled)
        rewarded = [
            rollout.text for rollout in group.rollouts if rollout.reward > group.mean_reward
        ]
        return any(self.policy.count_tokens(text) > limit + _MORE_TOKENS for text in rewarded)

    def _weigh(self, batch: list[Lesson]) -> None:
        lengths = [0 if s.is_hidden else len(s.token_ids) for s in batch]
        weights = sequence_weights(
            lengths, self._settings.loss_type, self._generation.max_completion_length
        )
        for sequence, weight in zip(batch, weights, strict=True):
            sequence.weight = 0.0 if sequence.is_hidden else weight

    def _split(
        self,
        batch: list[Lesson],
    ) -> Iterator[list[Lesson]]:
        """Split a batch into micro-batches within the token budget.

        A sequence that exceeds the budget alone is a micro-batch of its own. Sequences of the same
        prompt are adjacent, so that the prompt is computed once per micro-batch.
        """
        micro: list[Lesson] = []
        for sequence in sorted(
            batch, key=lambda s: (len(s.prompt_ids), s.prompt_ids, len(s.token_ids))
        ):
            if micro and self._count_tokens([*micro, sequence]) > self.budget.tokens:
                yield micro
                micro = []
            micro.append(sequence)
        yield micro

    def _count_tokens(self, micro: list[Lesson]) -> int:
        prompts = {s.prompt_ids for s in micro}
        return self._scorer.count_tokens(prompts, [len(s.token_ids) for s in micro])

    def _backward(
        self,
        batch: list[Lesson],
        is_first: bool,
    ) -> Pass:
        """Accumulate the gradients of the whole batch.

        If memory runs out, the whole batch is repeated: after other programs have returned memory,
        or else with a smaller budget. `is_first`: the log-probabilities of this pass become the old
        ones. Raises ResourceError if a single sequence does not fit into memory.
        """
        while True:
            micro_batches = list(self._split(batch))
            self._drop_gradients()
            try:
                sums = [self._backward_micro(micro, is_first) for micro in micro_batches]
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                reason = memory.reason_of(error)
            else:
                loss, *totals = torch.stack(sums).sum(0).tolist()
                counted = max(1, sum(len(s.token_ids) for s in batch if s.weight > 0))
                return Pass(loss, *(total / counted for total in totals))
            self._drop_gradients()
            memory.release(self.policy.model.device)
            if not self._shortage.wait():
                self._shrink(micro_batches, reason)

    def _backward_micro(
        self,
        micro: list[Lesson],
        is_first: bool,
    ) -> Tensor:
        """Accumulate a micro-batch's gradients; return its figures (4,).

        These are the loss, the tokens that were clipped at the lower and at the upper bound, and
        the entropy (NaN if it is not known), as sums over the tokens that count.
        """
        groups = [
            PromptGroup(prompt, tuple(s.token_ids for s in sequences))
            for prompt, sequences in groupby(micro, key=lambda s: s.prompt_ids)
        ]
        lengths = [len(s.token_ids) for s in micro]
        device = self.policy.model.device
        repeats = torch.tensor(lengths, device=device)
        advantages_M = torch.tensor([s.advantage for s in micro], device=device).repeat_interleave(
            repeats
        )
        weights_M = torch.tensor([s.weight for s in micro], device=device).repeat_interleave(
            repeats
        )
        reference_M = self._reference_logprobs(groups)
        with self._scorer.passes():
            logprobs_M, entropies_M = self._scorer.logprobs_and_entropies(
                groups, self._generation.temperature
            )
            if is_first:
                self._remember_old(micro, torch.split(logprobs_M.detach(), lengths))
            old_M = torch.cat([s.old_logprobs for s in micro if s.old_logprobs is not None])
            ratios_M = torch.cat([s.ratios for s in micro if s.ratios is not None])
            losses_M, clipped_M = token_losses(
                logprobs_M, old_M, advantages_M, self._settings, reference_M, ratios_M
            )
            loss = (losses_M * weights_M).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        counts_M = weights_M > 0
        entropy = (
            torch.full_like(loss, math.nan)
            if entropies_M is None
            else (entropies_M * counts_M).sum()
        )
        clipped_M &= counts_M
        # Only a lower ratio is clipped if the advantage is negative, only a higher one otherwise.
        low, high = (clipped_M & (advantages_M < 0)).sum(), (clipped_M & (advantages_M > 0)).sum()
        return torch.stack([loss.detach(), low, high, entropy.detach()])

    def _remember_old(self, micro: list[Lesson], old_logprobs: Sequence[Tensor]) -> None:
        sampler = [sequence.sampler_logprobs for sequence in micro]
        ratios = sampling_ratios(old_logprobs, sampler, self._settings)
        for sequence, old_T, ratios_T in zip(micro, old_logprobs, ratios, strict=True):
            sequence.old_logprobs = old_T
            if sequence.peer_id is None:
                sequence.ratios = ratios_T
            else:
                sequence.ratios = peer_text.token_weights(
                    old_T, self._settings.external_min_probability, sequence.repeated
                )

    def _mark_repeated(
        self,
        lessons: Sequence[tuple[ScoredGroup, list[Lesson]]],
        sampled: Sequence[ScoredGroup],
        collected: Sequence[ScoredGroup],
    ) -> None:
        """Mark tokens that a peer repeats across tasks and that this node hardly ever generates."""
        if not self._settings.external_ignore_repeated:
            return
        own = chain.from_iterable(group.sampled for group in sampled)
        self._peer_texts.see_own(completion.token_ids for completion in own)
        for group in collected:
            if group.peer_id is not None:
                prompt = self.policy.prompt_ids(group.question)
                answers = self._rewarded_ids(group)
                self._peer_texts.see(group.peer_id, group.task, prompt, answers)
        said = self._peer_texts.said()
        peer_ids = {group.peer_id for group, _ in lessons if group.peer_id is not None}
        repeated = {peer_id: self._peer_texts.repeated(peer_id, said) for peer_id in peer_ids}
        for group, sequences in lessons:
            if group.peer_id is not None:
                for sequence in sequences:
                    sequence.repeated = peer_text.is_repeated(
                        sequence.token_ids, repeated[group.peer_id]
                    )

    def _rewarded_ids(self, group: ScoredGroup) -> list[list[int]]:
        """Return the token ids of the answers that are, or could be, learned from."""
        longest = self._generation.max_completion_length
        return [
            self.policy.completion_ids(rollout.text, longest)[0]
            for rollout in group.rollouts
            if rollout.reward > 0 and (rollout.reward > group.mean_reward or not group.has_signal)
        ]

    def planters(self) -> Counter[str]:
        """Return for each peer in the last step the number of its groups that had planted text."""
        found = Counter[str]()
        for each in self.learned:
            if each.group.peer_id is not None:
                found[each.group.peer_id] += any(each.planted)
        return found

    def trusts(self, group: ScoredGroup) -> bool:
        """Return whether a group is ours, or from a peer whose last groups had no planted text."""
        return group.peer_id is None or not self._peer_texts.has_planted(group.peer_id)

    @torch.no_grad()
    def _reference_logprobs(self, groups: list[PromptGroup]) -> Tensor | None:
        if self._reference is None:
            return None
        without = lora.switched_off(self.policy.model) if self.lora else nullcontext()
        with without, self._reference.passes():
            return self._reference.logprobs(groups, self._generation.temperature)

    def _make_reference(self) -> Scorer | None:
        """Return the scorer of the model before training, for the KL term; None if beta is 0.

        Its model is a copy, or with adapters the policy's own model, whose adapters are then
        switched off.
        """
        if not self._settings.beta:
            return None
        if self.lora is not None:
            return self._scorer
        return Scorer(copy.deepcopy(self.policy.model).requires_grad_(False))

    def fit(
        self,
        file: Path,
        was_killed: bool = False,
    ) -> None:
        """Set the token budget for this machine: the one in `file`, or a measured one.

        The weights do not change. `was_killed`: the kernel OOM-killed the process before this one.
        If an allocator never fails, a kill is the only sign that the budget, or measuring it, takes
        too much memory. A stored budget is then lowered, and a missing one is not measured. Raises
        ModelError if a single sequence does not fit into memory.
        """
        self._budget_file = file
        self._budget_key = micro_batch.describe(self.policy, self._settings, self._generation)
        remembered = micro_batch.load(file, self._budget_key)
        if remembered is None and was_killed:
            log.warning(
                "the worker was OOM-killed before a token budget was measured: training on one"
                " sequence at a time, and raising the budget over the next hours; if the machine"
                " has more memory now, remove %s and restart the worker",
                file,
            )
            most = micro_batch.Budget(self._settings.max_tokens_per_micro_batch).as_measured()
            least = self._least_budget()
            least = replace(most, tokens=least.tokens, recomputes=True)
            self.budget = least.rising_after(micro_batch.AFTER_KILL_SECONDS)
        elif remembered is None:
            self.budget = self._measure_budget().as_measured()
        else:
            self.budget = self._lower_after_kill(remembered) if was_killed else remembered.risen()
        if self.budget != remembered:
            micro_batch.save(file, self._budget_key, self.budget)
        self._scorer.recomputes = self.budget.recomputes
        log.info("token budget tokens=%d recomputes=%s", self.budget.tokens, self.budget.recomputes)

    def _measure_budget(self) -> micro_batch.Budget:
        """Measure a budget by forward and backward passes over the longest prompt and completion.

        The weights do not change. Raises ModelError if the sequence does not fit into memory.
        """
        end = self.policy.end_ids[0]
        prompt_ids = (end,) * self._generation.max_prompt_length
        longest = Lesson(
            prompt_ids, (end,) * self._generation.max_completion_length, 1.0, False, weight=1.0
        )
        num_tokens = self._count_tokens([longest])
        # The optimizer allocates its moments (8 bytes a weight) in the first step.
        reserve = 0 if self.optimizer.state else 8 * sum(m.numel() for m in self.masters)
        found = None
        for self._scorer.recomputes in (False, True):
            found = micro_batch.measure(
                lambda: self._backward_micro([longest], is_first=True), self.policy.model.device
            )
            self._drop_gradients()
            if found is not None and found.needed <= found.available - reserve:
                break
        if found is None:
            raise ModelError(
                f"model {self.policy.name}: training on one sequence of {num_tokens} tokens does"
                f" not fit into the memory of {self.policy.model.device}; lower"
                " generation.max_prompt_length or generation.max_completion_length, set"
                " trainer.lora, or take a smaller model"
            )
        tokens = self._settings.max_tokens_per_micro_batch
        while (
            tokens > num_tokens and tokens / num_tokens * found.needed > found.available - reserve
        ):
            tokens //= 2
        worst = int(max(1.0, tokens / num_tokens) * found.needed)
        return micro_batch.Budget(tokens, self._scorer.recomputes, found.held + reserve, worst)

    def _shrink(
        self,
        micro_batches: list[list[Lesson]],
        reason: str,
    ) -> None:
        """Lower the budget after memory ran out.

        Raises ResourceError if the micro-batches are single sequences and layers are recomputed
        already.
        """
        before = self.budget
        if max(map(len, micro_batches)) > 1:
            self.budget = before.below(max(self._count_tokens(micro) for micro in micro_batches))
        elif not before.recomputes:
            self.budget = before.recomputing()
        else:
            longest = max(self._count_tokens(micro) for micro in micro_batches)
            raise ResourceError(
                f"out of memory on a single sequence of {longest} tokens ({reason}); free memory,"
                " or lower generation.max_prompt_length or generation.max_completion_length"
            )
        log.warning(
            "out of memory; repeating the step with a lower token budget tokens=%d before=%d"
            " recomputes=%s error=%s",
            self.budget.tokens,
            before.tokens,
            self.budget.recomputes,
            reason,
        )
        self.budget = self.budget.rising_after(micro_batch.AFTER_ERROR_SECONDS)
        self._scorer.recomputes = self.budget.recomputes
        if not self._shortage.is_foreign():
            self._save_budget()

    def _save_budget(self) -> None:
        if self._budget_file is not None:
            micro_batch.save(self._budget_file, self._budget_key, self.budget)

    def _raise_budget(self) -> None:
        """Raise a lowered budget by one step if its time has come.

        It is stored before it is used, because the kernel may kill the process.
        """
        before = self.budget
        self.budget = before.risen()
        if self.budget == before:
            return
        log.info(
            "raising the token budget tokens=%d before=%d recomputes=%s",
            self.budget.tokens,
            before.tokens,
            self.budget.recomputes,
        )
        self._scorer.recomputes = self.budget.recomputes
        self._save_budget()

    def _lower_after_kill(self, before: micro_batch.Budget) -> micro_batch.Budget:
        least = self._least_budget()
        if before.tokens > least.tokens:
            less = before.below(before.tokens)
        elif not before.recomputes:
            less = before.recomputing()
        else:
            log.warning(
                "the worker was OOM-killed and the micro-batch is already minimal: raise its memory"
                " limit, or lower generation.max_prompt_length or generation.max_completion_length"
            )
            return before
        less = less.rising_after(micro_batch.AFTER_KILL_SECONDS)
        log.warning(
            "the worker was OOM-killed; lowering the token budget tokens=%d before=%d"
            " recomputes=%s",
            less.tokens,
            before.tokens,
            less.recomputes,
        )
        return less

    def _least_budget(self) -> micro_batch.Budget:
        """Return the budget of one sequence at a time, with recomputed layers."""
        longest = self._generation.max_prompt_length + self._generation.max_completion_length
        return micro_batch.Budget(
            min(longest, self._settings.max_tokens_per_micro_batch), recomputes=True
        )

    def _release_memory(self) -> None:
        """Give a CPU's freed memory back to the system; a GPU's allocator keeps it for reuse."""
        device = self.policy.model.device
        if device.type == "cpu":
            memory.release(device)

    def _update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.copy_masters()
        self._drop_gradients()
        self.steps += 1

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Copy the float32 masters to the model's weights, if they are different tensors."""
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def _drop_gradients(self) -> None:
        for tensor in (*self.parameters.values(), *self.masters):
            tensor.grad = None

    @torch.no_grad()
    def is_sound(self) -> bool:
        """Return whether the policy's log-probabilities are finite.

        It is not enough to check the weights: weights of 1e20 are finite, but their outputs are
        not. Also False after a step that was skipped because a value was not finite.
        """
        if self.nonfinite_steps:
            return False
        end = self.policy.end_ids[:1]
        with self._scorer.passes():
            logprobs_M = self._scorer.logprobs(
                [PromptGroup(end, (end * 2,))], self._generation.temperature
            )
        return bool(logprobs_M.isfinite().all())

    def _skip_step(self, what: str) -> None:
        self._drop_gradients()
        self.nonfinite_steps += 1
        log.warning(
            "step skipped reason=non-finite in_a_row=%d what='%s'", self.nonfinite_steps, what
        )
        if self.nonfinite_steps >= self._settings.max_nonfinite_steps:
            raise TrainingError(
                f"{self.nonfinite_steps} non-finite steps in a row (the last: {what};"
                " trainer.max_nonfinite_steps allows no more); lower trainer.learning_rate: the"
                " node resumes from the checkpoint before them"
            )

    def _metrics(
        self,
        kept: Sequence[ScoredGroup],
        num_tokens: int,
        sampled: Sequence[ScoredGroup],
        done: Pass | None = None,
        grad_norm: float = 0.0,
        learning_rate: float = 0.0,
        skipped: str | None = None,
        figures: dict[str, float] | None = None,
    ) -> StepMetrics:
        seen = {**quality.of_completions(sampled), **(figures or {})}
        if done is not None:
            seen |= {
                "clip_ratio": done.clipped_low + done.clipped_high,
                "clip_ratio_low_mean": done.clipped_low,
                "clip_ratio_high_mean": done.clipped_high,
                "entropy": done.entropy,
            }
        done = done or Pass(0.0)
        num_local = sum(group.peer_id is None for group in kept)
        return StepMetrics(
            loss=done.loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_groups_local=num_local,
            num_groups_external=len(kept) - num_local,
            num_tokens=num_tokens,
            skipped=skipped,
            # Values that are not finite are left out, because the history is JSON.
            quality=StepQuality(**{n: value for n, value in seen.items() if math.isfinite(value)}),
        )


def _note_learned(group: ScoredGroup, sequences: Sequence[Lesson]) -> Learned:
    seen = [None if s.old_logprobs is None else float(s.old_logprobs.mean()) for s in sequences]
    advantages = tuple(s.advantage if s.weight else 0.0 for s in sequences)
    planted = tuple(peer_text.is_planted(s.old_logprobs, s.repeated) for s in sequences)
    return Learned(group, advantages, tuple(seen), planted)


@dataclass(frozen=True, slots=True)
class _Collect:
    """Hook that moves a parameter's gradient to its float32 master after a backward pass.

    Gradients of micro-batches are thus added in float32.
    """

    master: Tensor

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if self.master.grad is None:
            self.master.grad = parameter.grad.float()
        else:
            self.master.grad += parameter.grad
        parameter.grad = None


def _advantages(group: ScoredGroup, scale_rewards: str) -> list[float]:
    """Return the advantages of a group from its rewards, or from its credits if these are equal.

    Advantages from credits are multiplied by the credits' weight. Answers without a credit get 0
    and are not learned from: most of them have the maximum length, so they would take most of a
    step's time and memory, and the answers with a credit already teach the format.
    """
    weight = max(group.credits)
    if group.has_signal or not weight:
        return group_advantages(group.rewards, scale_rewards)
    advantages = group_advantages([c / weight for c in group.credits], scale_rewards)
    return [weight * max(0.0, advantage) for advantage in advantages]


def _has_finite_logprobs(groups: Sequence[ScoredGroup]) -> bool:
    """Return whether all log-probabilities of our own answers are finite."""
    completions = chain.from_iterable(group.sampled for group in groups)
    return all(all(map(math.isfinite, completion.logprobs)) for completion in completions)


def _scheduled_rate(trainer: settings.Trainer, steps: int) -> float:
    """Return the learning rate after `steps` steps, as transformers' schedules of these names do.

    Raises ValueError if the settings do not have a learning rate.
    """
    rate = trainer.learning_rate
    if rate is None:
        raise ValueError("trainer.learning_rate: None; expected the result of settle_method")
    if steps < trainer.warmup_steps:
        return rate * steps / trainer.warmup_steps
    if trainer.max_steps is None or trainer.lr_scheduler_type.startswith("constant"):
        return rate
    progress = min(
        1.0, (steps - trainer.warmup_steps) / max(1, trainer.max_steps - trainer.warmup_steps)
    )
    if trainer.lr_scheduler_type == "linear":
        return rate * (1 - progress)
    return rate * 0.5 * (1 + math.cos(math.pi * progress))

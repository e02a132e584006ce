# ruff: noqa: N803, N806 - tensors are named with their axes
"""One GRPO step on a batch of groups: our own and our peers'.

A peer's text is re-tokenised and scored as if our own policy had sampled it (SAPO). The old log-probabilities are the
detached ones of the first pass over the batch, so no second forward pass is ever made for them. Work is cut into
micro-batches by a token budget; weights of tokens are fixed before, so the cut changes nothing but memory.
"""

# N sequences, T completion tokens

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker import settings
from worker.errors import TrainingError
from worker.policy.policy import Policy
from worker.policy.scoring import completion_logprobs
from worker.records import ScoredGroup, StepMetrics
from worker.trainer.grpo import group_advantages, sequence_weights, token_losses

log = logging.getLogger(__name__)

_MAX_LOGITS = 1 << 28
"""Numbers in the logits of one micro-batch (1 GiB in float32), whatever its token budget: vocabularies are large."""


@dataclass(slots=True)
class Lesson:
    """One completion to learn from. `weight` is what each of its tokens weighs in the loss; 0 hides it."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    advantage: float
    is_hidden: bool
    weight: float = 0.0
    old_logprobs: Tensor | None = None


class Trainer:
    """Trains `policy` in place. Everything that a checkpoint needs: `policy`, `optimizer`, `masters`, `steps`,
    `nonfinite_steps`.

    `dropped` counts, over the trainer's life, groups that a step could not use, by reason.
    """

    def __init__(self, policy: Policy, trainer: settings.Trainer, generation: settings.Generation) -> None:
        self.policy = policy
        self.steps = 0
        self.nonfinite_steps = 0
        self.dropped: Counter[str] = Counter()
        self._settings = trainer
        self._generation = generation
        self._reference = copy.deepcopy(policy.model).requires_grad_(False) if trainer.beta else None
        self._parameters = [p for p in policy.model.parameters() if p.requires_grad]
        # Updates of 1e-6 vanish in bfloat16: such weights have a float32 master that the optimizer works on.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": trainer.weight_decay},
                {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},  # norms and biases, as in TRL
            ],
            lr=trainer.learning_rate,
            betas=(trainer.adam_beta1, trainer.adam_beta2),
            eps=trainer.adam_epsilon,
            fused=True,
        )

    @property
    def learning_rate(self) -> float:
        """That of the next step: a function of the steps made, so there is no scheduler to save."""
        return _scheduled_rate(self._settings, self.steps)

    def step(self, groups: Sequence[ScoredGroup]) -> StepMetrics:
        """Learn from `groups` once (`num_iterations` optimizer steps).

        Groups that can't be used are dropped and counted. A non-finite loss or gradient leaves the weights as they are;
        after `max_nonfinite_steps` of those in a row: TrainingError.
        """
        started = time.monotonic()
        usable = [(group, sequences) for group in groups if (sequences := self._read(group))]
        batch = [sequence for _, sequences in usable for sequence in sequences]
        if not batch:
            return self._metrics(started, [], 0, skipped="no-signal")
        self._weigh(batch)
        micro_batches = list(self._split(batch))
        loss = grad_norm = clip_ratio = rate = 0.0
        skipped: str | None = None
        for _ in range(self._settings.num_iterations):
            rate = self.learning_rate
            loss, clip_ratio = self._backward(micro_batches)
            grad_norm = self._gather_gradients()
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._skip_step(loss, grad_norm)
                skipped = "non-finite"
                break
            self._update(rate)
        num_tokens = sum(len(s.token_ids) for s in batch)
        kept = [group for group, _ in usable]
        return self._metrics(started, kept, num_tokens, loss, grad_norm, rate, clip_ratio, skipped)

    def _read(self, group: ScoredGroup) -> list[Lesson]:
        """The group's sequences; none, counted by reason, if it can't be learned from."""
        prompt = self.policy.prompt_ids(group.question)
        reason = self._find_fault(group, prompt)
        if reason is not None:
            self.dropped[reason] += 1
            log.warning("group dropped reason=%s family=%s peer=%s", reason, group.task.family, group.peer_id or "self")
            return []
        sequences = []
        for i, advantage in enumerate(group_advantages(group.rewards, self._settings.scale_rewards)):
            if group.token_ids is None:
                ids, truncated = self.policy.completion_ids(
                    group.completions[i], self._generation.max_completion_length
                )
            else:
                ids, truncated = list(group.token_ids[i]), bool(group.truncated and group.truncated[i])
            is_hidden = truncated and self._settings.mask_truncated_completions
            sequences.append(Lesson(tuple(prompt), tuple(ids), advantage, is_hidden))
        return sequences

    def _find_fault(self, group: ScoredGroup, prompt: list[int]) -> str | None:
        if len(group.completions) < 2:
            return "too-small"
        if len(group.rewards) != len(group.completions):
            return "ragged"
        if group.token_ids is not None and not (
            len(group.token_ids) == len(group.completions)
            and all(0 < len(ids) <= self._generation.max_completion_length for ids in group.token_ids)
        ):
            return "ragged"
        if not all(math.isfinite(reward) for reward in group.rewards):
            return "non-finite-reward"
        if not group.has_signal:
            return "no-signal"
        if not 0 < len(prompt) <= self._generation.max_prompt_length:
            return "prompt-length"
        return None

    def _weigh(self, batch: list[Lesson]) -> None:
        lengths = [0 if s.is_hidden else len(s.token_ids) for s in batch]
        weights = sequence_weights(lengths, self._settings.loss_type, self._generation.max_completion_length)
        for sequence, weight in zip(batch, weights, strict=True):
            sequence.weight = 0.0 if sequence.is_hidden else weight

    def _split(self, batch: list[Lesson]) -> Iterator[list[Lesson]]:
        """Micro-batches within the token budget; a sequence that is over it alone goes alone.

        Those of one prompt stay together, those of similar length too: both save padding and prompt passes.
        """
        num_tokens = self.policy.num_tokens
        micro: list[Lesson] = []
        for sequence in sorted(batch, key=lambda s: (len(s.prompt_ids), s.prompt_ids, len(s.token_ids))):
            trial = [*micro, sequence]
            prompts = {s.prompt_ids for s in trial}
            completion_tokens = len(trial) * max(len(s.token_ids) for s in trial)
            tokens = completion_tokens + len(prompts) * max(map(len, prompts))
            is_full = tokens > self._settings.max_tokens_per_micro_batch or completion_tokens * num_tokens > _MAX_LOGITS
            if micro and is_full:
                yield micro
                trial = [sequence]
            micro = trial
        yield micro

    def _backward(self, micro_batches: list[list[Lesson]]) -> tuple[float, float]:
        """Accumulate the gradients of the whole batch. Returns its loss and the share of clipped tokens."""
        self.policy.model.zero_grad(set_to_none=True)
        loss = clipped = 0.0
        for micro in micro_batches:
            logprobs_NT = _logprobs(self.policy.model, micro, self._generation.temperature)
            weights_NT = _pad([[s.weight] * len(s.token_ids) for s in micro], logprobs_NT)
            if micro[0].old_logprobs is None:
                for sequence, row_T in zip(micro, logprobs_NT.detach(), strict=True):
                    sequence.old_logprobs = row_T
            old_NT = torch.stack([s.old_logprobs for s in micro if s.old_logprobs is not None])
            reference_NT = None
            if self._reference is not None:
                with torch.no_grad():
                    reference_NT = _logprobs(self._reference, micro, self._generation.temperature)
            advantages_N = torch.tensor([s.advantage for s in micro], device=logprobs_NT.device)
            losses_NT, clipped_NT = token_losses(logprobs_NT, old_NT, advantages_N, self._settings, reference_NT)
            micro_loss = (losses_NT * weights_NT).sum()
            micro_loss.backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.item()
            clipped += (clipped_NT & (weights_NT > 0)).sum().item()
        counted = sum(len(s.token_ids) for micro in micro_batches for s in micro if s.weight > 0)
        return loss, clipped / max(1, counted)

    def _gather_gradients(self) -> float:
        """Clip the gradients, in float32. Returns their norm before."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        return float(torch.nn.utils.clip_grad_norm_(self.masters, self._settings.max_grad_norm))

    def _update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.copy_masters()
        self.policy.model.zero_grad(set_to_none=True)
        self.steps += 1
        self.nonfinite_steps = 0

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Bring the model's weights up to their float32 masters, where these are not the same tensors."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def _skip_step(self, loss: float, grad_norm: float) -> None:
        self.policy.model.zero_grad(set_to_none=True)
        self.nonfinite_steps += 1
        log.warning(
            "step skipped reason=non-finite loss=%s grad_norm=%s in_a_row=%d", loss, grad_norm, self.nonfinite_steps
        )
        if self.nonfinite_steps >= self._settings.max_nonfinite_steps:
            raise TrainingError(
                f"{self.nonfinite_steps} non-finite steps in a row (last loss {loss}, gradient norm {grad_norm}; "
                "trainer/max_nonfinite_steps allows no more); lower trainer/learning_rate and start from a checkpoint"
            )

    def _metrics(
        self,
        started: float,
        kept: Sequence[ScoredGroup],
        num_tokens: int,
        loss: float = 0.0,
        grad_norm: float = 0.0,
        learning_rate: float = 0.0,
        clip_ratio: float = 0.0,
        skipped: str | None = None,
    ) -> StepMetrics:
        num_local = sum(group.peer_id is None for group in kept)
        return StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_groups_local=num_local,
            num_groups_external=len(kept) - num_local,
            num_tokens=num_tokens,
            seconds=time.monotonic() - started,
            clip_ratio=clip_ratio,
            skipped=skipped,
        )


def _logprobs(model: torch.nn.Module, micro: list[Lesson], temperature: float) -> Tensor:
    prompts = list(dict.fromkeys(s.prompt_ids for s in micro))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    return completion_logprobs(
        model, prompts, [s.token_ids for s in micro], [number[s.prompt_ids] for s in micro], temperature
    )


def _pad(rows: list[list[float]], like_NT: Tensor) -> Tensor:
    width = like_NT.shape[1]
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], device=like_NT.device)


def _scheduled_rate(trainer: settings.Trainer, steps: int) -> float:
    """transformers' constant_with_warmup, linear and cosine schedules."""
    if steps < trainer.warmup_steps:
        return trainer.learning_rate * steps / trainer.warmup_steps
    if trainer.lr_scheduler_type == "constant" or trainer.max_steps is None:
        return trainer.learning_rate
    progress = min(1.0, (steps - trainer.warmup_steps) / max(1, trainer.max_steps - trainer.warmup_steps))
    if trainer.lr_scheduler_type == "linear":
        return trainer.learning_rate * (1 - progress)
    return trainer.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

"""Sections about training."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from worker.settings.value_types import Decay, Positive, Section

_MIN_PARAMETERS_FOR_LORA = 50_000_000
_ITERATIONS_WITH_ADAPTERS = 2


def _learning_rate(num_parameters: int, has_adapters: bool) -> float:
    """Return the default learning rate; docs/decisions/0027 has the measurements."""
    if has_adapters and num_parameters < 400_000_000:
        return 5e-4
    if has_adapters:
        return 2e-4 if num_parameters < 2_000_000_000 else 1e-4
    if num_parameters < 50_000_000:
        return 5e-5
    return 1e-5 if num_parameters < 400_000_000 else 1e-6


class Lora(Section):
    """Low-rank adapters, which are trained instead of the weights."""

    rank: Annotated[int, Field(gt=0, le=1024)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Field(gt=0)] = 32
    """The product of an adapter is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the linear layers with adapters, such as q_proj. None: all but the output layer."""


class Trainer(Section):
    """GRPO with swarm sampling (SAPO, arXiv 2509.08721). Keys that GRPOConfig has mean the same."""

    local_groups: Annotated[int, Field(ge=0)] = 5
    """I: own groups that a node trains on in a round."""
    external_groups: Annotated[int, Field(ge=0)] = 12
    """J: groups of peers that a node trains on in a round."""
    fill_missing: bool = True
    """Take more local groups if there are fewer than J external ones with a signal, and the other
    way round."""
    external_completions: Literal["better", "all"] = "better"
    """Completions of a peer's group that are learned from. better: those above the group's mean;
    all: as in SAPO."""
    external_min_probability: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Smallest probability under this node's policy at which a token of a peer's answer has full
    weight; a token that is half as likely has half the weight. 0: all tokens have full weight."""
    external_ignore_repeated: bool = True
    """Leave out of the loss the stretches of text that a peer repeats in its answers to different
    tasks and that this node hardly ever generates."""
    max_completions: Annotated[int, Field(ge=2)] = 72
    """Most completions that a step learns from. Of a larger batch each group keeps at most an equal
    number, those with the most different rewards; completions that are left out for another reason
    (`external_completions`) do not count."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate. None: for adapters 2e-4, in models of less than 400 million parameters 5e-4,
    of 2 billion and more 1e-4; for all weights 1e-6, in models of less than 400 million parameters
    1e-5, of less than 50 million 5e-5."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Decay = 0.9
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: Decay = 0.999
    """Decay of AdamW's mean of the squared gradients."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients with a larger norm are scaled down to it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0. Not with `constant`."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Course of the learning rate."""
    max_steps: Positive | None = None
    """Steps over which `linear` and `cosine` fall to 0; they require it, the others do not."""
    num_iterations: Positive | None = None
    """Optimizer passes over one round's batch. None: 2 for adapters, 1 for all weights."""
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    """Lower clip range."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = 0.28
    """Upper clip range. None: the same as `epsilon`."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term against the reference model. 0: no reference model is loaded."""
    importance_sampling_correction: bool = True
    """Weigh local answers by the ratio of their probability in the trainer to that in the sampling
    engine (TRL's vllm_importance_sampling_correction). External answers have the weight that
    `external_min_probability` describes."""
    importance_sampling_mode: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "token_truncate_sequence_mask",
    ] = "sequence_mask"
    """One ratio per token or per answer; ratios out of bounds are limited (truncate) or become 0
    (mask). These are TRL's modes and default, except for the last: it limits the ratios of tokens
    and leaves out answers whose own ratio is out of bounds."""
    importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = 3.0
    """Largest ratio. None: no upper bound."""
    importance_sampling_clip_min: Annotated[float, Field(ge=0)] | None = None
    """Smallest ratio. None: no lower bound."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """Average of the losses of tokens, as in GRPOConfig."""
    scale_rewards: Literal["floored", "group", "none"] = "floored"
    """Divisor of advantages. group: the standard deviation of the group's rewards, as in GRPO;
    floored: the same, but at least 0.2, so that small differences between wrong answers do not
    count as much as right ones; none: 1."""
    mask_truncated_completions: bool = False
    """Leave truncated completions (cut off at the maximum length) out of the loss."""
    max_tokens_per_micro_batch: Positive = 16384
    """Most tokens, prompts and completions, in one forward and backward pass. The node measures at
    its first start how many fit, and stores the result in `budget.json` of its state folder."""
    lora: Lora | Literal["auto"] | None = "auto"
    """Train low-rank adapters (peft) of `rank` (16), scaled by `alpha` (32) / rank, in the linear
    layers in `target_modules` (none: all but the output layer), and keep the weights. None: train
    all weights. auto: adapters in models of 50 million parameters and more; a node with checkpoints
    continues with their method. To change the method, start from the beginning."""
    max_nonfinite_steps: Positive = 10
    """Stop with code 8 after this many non-finite steps in a row."""

    def lora_for(self, parameters: int) -> Lora | None:
        """Return the adapters for a model of this many parameters; None: train all weights."""
        if self.lora == "auto":
            return Lora() if parameters >= _MIN_PARAMETERS_FOR_LORA else None
        return self.lora

    def settle(self, parameters: int) -> Self:
        """Return these settings with the values that depend on the model's size filled in."""
        lora = self.lora_for(parameters)
        rate = self.learning_rate or _learning_rate(parameters, lora is not None)
        iterations = self.num_iterations or (1 if lora is None else _ITERATIONS_WITH_ADAPTERS)
        return self.model_copy(
            update={"lora": lora, "learning_rate": rate, "num_iterations": iterations}
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.local_groups + self.external_groups == 0:
            raise ValueError(
                "local_groups and external_groups are both 0: there would be nothing to train on"
            )
        self._check_schedule()
        self._check_importance_sampling()
        return self

    def _check_schedule(self) -> None:
        if self.lr_scheduler_type in ("linear", "cosine") and self.max_steps is None:
            raise ValueError(f"lr_scheduler_type {self.lr_scheduler_type} needs max_steps")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and lr_scheduler_type constant, which has"
                " none; expected lr_scheduler_type constant_with_warmup"
            )

    def _check_importance_sampling(self) -> None:
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"importance_sampling_clip_min is {low:g}; expected less than"
                f" importance_sampling_clip_max, {high:g}"
            )
        if low is None and high is None and self.importance_sampling_mode.endswith("truncate"):
            raise ValueError(
                f"importance_sampling_mode {self.importance_sampling_mode} needs"
                " importance_sampling_clip_max or importance_sampling_clip_min"
            )

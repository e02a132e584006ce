"""Sections about a node, its model, its tasks and how it generates answers."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from worker.settings.value_types import Fraction, Positive, Seconds, Section


class Node(Section):
    """The node's name, and where it keeps its state."""

    state_dir: Path = Path("/var/lib/hivewright")
    """Folder of everything that must survive: identity, ledger, checkpoints, peer cache. One per
    slot."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "worker"
    """Display name in logs, tables and the dashboard. The identity is the peer id."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of sampling and training. Tasks do not depend on it; their seed is peer id and round."""
    max_rounds: Positive | None = None
    """Stop after this many trained rounds; rounds without a learning signal do not count. None: run
    forever."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Begin no further round when the node has run for this many minutes since its start. None: run
    forever."""
    min_free_disk_mb: Annotated[int, Field(ge=0)] = 500
    """Refuse to start with less free space in `state_dir`, in 10^6 bytes."""
    max_parts_per_round: Annotated[int, Field(ge=1, le=256)] = 256
    """Most parts of a round. After the first part, which is shared and rewarded, the node continues
    while the round is open, with more tasks of its sequence and with the groups of peers that have
    arrived. 1: wait for the next round instead."""
    max_parts_per_step: Annotated[int, Field(ge=1, le=256)] = 3
    """Most parts that the node answers before a training step. It answers another part first if
    fewer groups, its own and peers', have rewards that differ than `trainer.local_groups` (or
    `environment.tasks_per_round`, if that is less): dynamic sampling (DAPO, arXiv 2503.14476)."""
    checkpoint_every: Positive = 1
    """Rounds between two checkpoints; each further part of a round counts as one."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints to keep."""
    eval_every_rounds: Positive | None = None
    """Evaluate the model on held-out tasks before the first round and after every N trained rounds.
    The results are in `evaluations.jsonl`, the status and the model card. None: only with
    `hivewright eval`."""
    eval_seconds: Seconds = 120.0
    """Longest duration of such an evaluation, in seconds. If it is too short for all tasks, fewer
    are asked."""
    answers_rounds: Annotated[int, Field(ge=0)] = 200
    """Number of rounds of which all answers, local and external, are kept for `hivewright answers`.
    0: none."""
    answers_mb: Positive = 200
    """Most space for these answers, in 10^6 bytes. The oldest rounds are removed first."""


class Model(Section):
    """The language model that is trained."""

    name: str = "hivewright/tiny"
    """A Hugging Face name, a local path, `hivewright/tiny` (the small model in the package), or
    `auto`: chosen by the machine's memory, once, by `hivewright enrol`. `hivewright check` shows
    which models fit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. auto: bfloat16 on a GPU, and for models of 50 million parameters and
    more on a CPU with AMX or AVX-512 BF16 (two to three times as fast there); float32 on other
    CPUs. Adapters are always trained in float32."""
    shared_dir: Path | None = None
    """Folder with models that the nodes of a machine share. They only read it; `hivewright fetch`
    downloads to it. None: each node downloads for itself. A deploy sets it."""
    token_file: Path | None = None
    """File with a Hugging Face token, for gated and private models. Only `hivewright fetch` reads
    it, so it requires `shared_dir`. In an inventory: a file on the operator's side; the host has
    the token only during the download."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    """Device of the model. auto: the first visible GPU, or else the CPU."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of torch. None: torch decides."""


class Family(Section):
    """One task family of the mix."""

    name: str
    """A reasoning-gym data set, such as `basic_arithmetic`; or ENVIRONMENT/FAMILY, such as
    `code/lists`: functions that the model writes, run in a sandbox."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share in the mix, relative to the other families."""
    config: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies defaults
    """The environment's configuration of the family. Keys that are not set keep the environment's
    defaults."""
    level: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Level of the family's curriculum, 0 the easiest; `config` overrides the values of the level.
    auto: begins at 0, rises when the tasks are solved and falls when nothing is learned; the more
    the rewards within its last groups differed, the more often the family is drawn. None: only
    `config`."""
    rise_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """Raise the level by one when the mean reward of the last 10 groups at it is at least this. It
    falls again, not below `level`, when nothing is learned. None: a fixed level; 0.7 with `level:
    auto`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rise_at is not None and self.level is None:
            raise ValueError("rise_at needs a level to rise from, such as level: 0")
        return self


def split_family(name: str) -> tuple[str, str]:
    """Return a family's environment and its name there; names without "/" are of reasoning-gym."""
    source, slash, rest = name.partition("/")
    return (source, rest) if slash else ("reasoning-gym", name)


DEFAULT_FAMILIES = (
    "arc_1d",
    "basic_arithmetic",
    "base_conversion",
    "bf",
    "binary_matrix",
    "calendar_arithmetic",
    "chain_sum",
    "decimal_arithmetic",
    "fraction_simplification",
    "leg_counting",
    "propositional_logic",
)


class Environment(Section):
    """The tasks of a node."""

    families: Annotated[tuple[Family, ...], Field(min_length=1)] = tuple(
        Family(name=n, level="auto") for n in DEFAULT_FAMILIES
    )
    """The mix. Peers learn from each other only in families and configurations that both have."""
    tasks_per_round: Positive = 9
    """Number of tasks that the node answers in a round."""


class Generation(Section):
    """Sampling of answers. Keys have the names and the meaning of TRL's GRPOConfig."""

    num_generations: Annotated[int, Field(ge=2, le=256)] = 8
    """G: completions per task."""
    max_prompt_length: Positive = 512
    """Longest prompt, in tokens. Longer ones are dropped and counted."""
    max_completion_length: Positive = 256
    """Longest completion, in tokens."""
    completion_length: Literal["auto", "max"] = "auto"
    """Length at which completions are cut off. auto: twice the length of nearly all answers that
    closed their tag in the last rounds, at most `max_completion_length`; max: that length."""
    form: Literal[
        "auto", "system", "user", "example", "three-examples", "two-examples", "user-begun", "begun"
    ] = "auto"
    """Form of the prompt. system: the instruction in the system turn; user: after the question;
    example and three-examples: after the question, preceded by one or three questions with worked
    answers; two-examples: instruction in the system turn, two bare answers; begun and user-begun:
    one example, and the answer begins with `<answer>`. auto: the node measures at its first start
    in which form the largest share of the model's given answers is right, and stores the result in
    `form.json` of its state folder."""
    thinking: Literal["auto", "on", "off", "template"] = "auto"
    """Let a model think before it answers, if its chat template has a switch for that. auto: off if
    `max_completion_length` is under 1024 tokens, too short for it; otherwise the template's
    default, as with `template`."""
    chat_template_kwargs: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies defaults
    """Further arguments of the chat template, such as `reasoning_effort: low`."""
    temperature: Annotated[float, Field(ge=1e-6)] = 1.0
    """Divisor of the logits."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens. 0: all."""
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    min_p: Fraction | None = None
    """Sample from tokens with at least this share of the largest probability. None: all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Factor by which tokens that already occurred become less likely. 1: none."""
    engine: Literal["auto", "torch", "vllm", "transformers"] = "auto"
    """Engine that samples. torch: our own batched engine; vllm: vLLM, if installed; transformers:
    `model.generate`, for comparison. auto: vllm on a GPU if it is installed and computes the model
    exactly, otherwise torch. The worker logs its choice."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the GPU's memory for vLLM: its copy of the weights, keys and values. Training
    measures what is left."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights that our engine samples with, independent of `model.dtype`. auto:
    bfloat16 on CPUs that compute it fast (AMX, or AVX2 and a C compiler), otherwise the model's
    type. With a C compiler bfloat16 stands for the fastest 16-bit format of the CPU: bfloat16,
    float16, or integers with a scale; the last two are more exact."""

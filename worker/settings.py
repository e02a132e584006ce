"""Every setting of every role: typed, frozen, strict. The only place where a default stands.

Settings flow one way: flat inventory keys (`trainer_learning_rate`) -> `from_flat`, on the
operator's machine, for all hosts, before anything is touched -> `dump` into /etc/hivewright/*.yaml
-> `load` in the role. Secrets never are settings: the settings hold the paths of files that hold
them. Hyper-parameters carry GRPOConfig's names and meaning.

Imports nothing heavy: an operator's laptop reads this module too.
"""

import difflib
import json
import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from worker import multiaddr
from worker.errors import SettingsError

SETTINGS_VERSION = 1
ACCOUNT_TOKEN_FILE = "account.token"  # noqa: S105 - a file name
MAX_FILE_BYTES = 1 << 20

Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Address = Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]
Weight = Annotated[float, Field(ge=0, le=8)]
PeerId = Annotated[str, Field(pattern=f"^{multiaddr.PEER_ID}$")]
_URL = r"^https?://[^\s]+$"
Url = Annotated[str, Field(pattern=_URL)]
Urls = Annotated[
    tuple[Url, ...], Field(min_length=1), BeforeValidator(lambda value: _listed(value))
]
Host = Annotated[str, AfterValidator(lambda value: _bare(value))]
Multiaddr = Annotated[str, AfterValidator(lambda value: _sound(value))]
PeerMultiaddr = Annotated[Multiaddr, AfterValidator(lambda value: _with_sound_peer(value))]

# What peers read in a record (swarm/wire.py).
_MULTIADDR = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/([0-9A-Za-z.:_-]{1,200})/(?:tcp|udp)/([0-9]{1,5})(?:/[0-9A-Za-z.:_-]+)*"
)
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)([.](?!-)[A-Za-z0-9_-]{1,63}(?<!-))*[.]?")
_IP_ADDRESSES = {"ip4": IPv4Address, "ip6": IPv6Address}


def _sound(multiaddr: str) -> str:
    try:
        match = _MULTIADDR.fullmatch(multiaddr)
        is_sound = (
            match is not None
            and _IP_ADDRESSES.get(match[1], str)(match[2])
            and int(match[3]) <= 65535
        )
    except ValueError:
        is_sound = False
    if not is_sound:
        raise ValueError(
            f"got {_short(multiaddr)}; expected an address such as /ip4/192.0.2.1/tcp/38000"
        )
    return multiaddr


def _bare(host: str) -> str:
    if not is_host(host):
        raise ValueError(
            f"got {_short(host)}; expected a name or an address, without http:// and port"
        )
    return host


def is_host(text: str) -> bool:
    """Return whether it is a name or an address and nothing more: no scheme, no port, no
    brackets."""
    try:
        ip_address(text)
    except ValueError:
        return _NAME.fullmatch(text) is not None
    return True


def _with_sound_peer(text: str) -> str:
    if multiaddr.P2P not in text:
        raise ValueError(
            f"got {_short(text)}; expected /p2p/ and the peer id at its end: who it has to be"
        )
    _, peer_id = multiaddr.split_peer(text)
    if not multiaddr.is_peer_id(peer_id):
        raise ValueError(f"got {_short(text)}; {peer_id} is not a peer id")
    return text


def _listed(value: Any) -> Any:
    """One text is a list of one."""
    return (
        (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Node(Section):
    """Who this node is and where it keeps things."""

    state_dir: Path = Path("/var/lib/hivewright")
    """Folder of everything that must survive: identity, ledger, checkpoints, peer cache. One per
    slot."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "worker"
    """Name for people: in logs, tables and the dashboard. The identity is the peer id, not this."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of sampling and training; tasks do not depend on it, they are seeded by peer id and
    round."""
    max_rounds: Positive | None = None
    """Stop after this many trained rounds; rounds without a learning signal do not count. None: run
    forever."""
    min_free_disk_mb: Annotated[int, Field(ge=0)] = 500
    """Refuse to start with less free space (in 10^6 bytes) than this in `state_dir`."""
    checkpoint_every: Positive = 1
    """Rounds between two checkpoints."""
    keep_checkpoints: Positive = 2
    """Number of checkpoints that are kept."""
    eval_every_rounds: Positive | None = None
    """Evaluate the model on held-out tasks before the first round and after every N trained rounds;
    results are in `evaluations.jsonl`, the status and the model card. None: only when `hivewright
    eval` is run."""
    eval_seconds: Seconds = 120.0
    """Longest time that one such evaluation takes; fewer tasks are asked where that is too short
    for all."""
    answers_rounds: Annotated[int, Field(ge=0)] = 200
    """Rounds of which all answers, own and peers', are kept for `hivewright answers`. 0: none."""
    answers_mb: Positive = 200
    """Most space (in 10^6 bytes) that they take; the oldest rounds are removed first."""


class Model(Section):
    """The language model that is trained."""

    name: str = "hivewright/tiny"
    """A Hugging Face name, a local path, `hivewright/tiny` (the small model that comes with the
    package), or `auto`: by the machine's memory, decided once by `hivewright enrol`. `hivewright
    check` shows what fits."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights. auto: bfloat16 on a GPU, and on a CPU with AMX for models of 50 million
    parameters and more, three times as fast there; float32 on other CPUs. Adapters are always
    trained in float32."""
    shared_dir: Path | None = None
    """Folder with models that the nodes of a machine share: they only read it, `hivewright fetch`
    downloads to it. None: each node downloads for itself. A deploy sets it."""
    token_file: Path | None = None
    """File with a Hugging Face token, for gated and private models. Only `hivewright fetch` reads
    it, so it needs `shared_dir`. In an inventory: a file on the operator's side; the host has it
    only while it fetches."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where the model lives. auto: the first GPU that is visible, else the CPU."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of torch. None: torch decides."""


class Family(Section):
    """One task family of the mix."""

    name: str
    """A reasoning-gym data set name, such as `basic_arithmetic`; or `code/lists`, `code/texts`,
    `code/numbers`: functions that the model writes, run in a sandbox."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share in the mix, relative to the other families."""
    config: dict[str, Any] = {}
    """The environment's own configuration of the family; what is not named keeps the environment's
    default."""
    level: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Level of the family's curriculum, 0 the easiest; `config` takes precedence over what it sets.
    auto: it begins at 0, rises when the tasks are solved and falls when nothing is learned, and the
    family is drawn the more often the more of its last groups had a signal. None: `config`
    alone."""
    rise_at: Annotated[float, Field(gt=0, le=1)] | None = None
    """The level rises by one when the mean reward of the last 10 groups at it is at least this, and
    falls again, not below `level`, when nothing is learned there. None: it stays; with `level:
    auto` 0.7."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rise_at is not None and self.level is None:
            raise ValueError("rise_at needs a level to rise from, such as level: 0")
        return self


def split_family(name: str) -> tuple[str, str]:
    """The environment that a family is of, and its name there: "code/numbers" is of code, others of
    reasoning-gym."""
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
    """The tasks that are asked."""

    families: Annotated[tuple[Family, ...], Field(min_length=1)] = tuple(
        Family(name=n, level="auto") for n in DEFAULT_FAMILIES
    )
    """The mix. Peers only learn from each other in the families (and configurations) that both
    have."""
    tasks_per_round: Positive = 9
    """Number of tasks that the node answers in a round."""


class Generation(Section):
    """Sampling of answers. Names and meaning are GRPOConfig's."""

    num_generations: Annotated[int, Field(ge=2, le=256)] = 8
    """G: completions for each task."""
    max_prompt_length: Positive = 512
    """Tokens of a prompt; longer ones are dropped and counted."""
    max_completion_length: Positive = 256
    """Tokens of a completion."""
    form: Literal[
        "auto", "system", "user", "example", "three-examples", "two-examples", "user-begun", "begun"
    ] = "auto"
    """How a question is put. system: the instruction in the system turn; user: behind the question;
    example and three-examples: so, after one or three questions with worked answers; two-examples:
    instruction in the system turn, two bare answers; begun and user-begun: an example, and the
    answer is begun for the model with `<answer>`. auto: the node finds out, once, at its first
    start, in which one this model's given answers are right most often, and remembers that in
    `form.json` of its state folder."""
    thinking: Literal["auto", "on", "off", "template"] = "auto"
    """Whether models whose chat template has a switch for thinking think first. auto: off where
    `max_completion_length` is under 1024 tokens, too short for a thought; else as the template has
    it, as with `template`."""
    chat_template_kwargs: dict[str, Any] = {}
    """What else the chat template is rendered with, such as `reasoning_effort: low`."""
    temperature: Annotated[float, Field(ge=1e-6)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens. 0: all."""
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    engine: Literal["auto", "torch", "vllm", "transformers"] = "auto"
    """What samples. torch: our own batched engine; vllm: vLLM, where it is installed; transformers:
    `model.generate`, for comparison. auto: vllm on a GPU if it is installed and runs the model
    exactly, else torch. The worker's log says which it is."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the GPU's memory for vLLM: its copy of the weights, keys and values. Training
    measures what is left."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights that our engine samples with, whatever the model is trained in. auto:
    bfloat16 on CPUs that are fast at it (AMX, or AVX2 and a C compiler), else the model's own. With
    a C compiler bfloat16 is whichever 16 bits the CPU is fastest with: bfloat16, float16, or whole
    numbers with a scale; the others are more exact."""


class Lora(Section):
    """Low-rank adapters, which are trained in the place of the weights."""

    rank: Annotated[int, Field(gt=0, le=1024)] = 16
    alpha: Annotated[int, Field(gt=0)] = 32
    """The adapters' product is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the linear layers that get one, such as q_proj. None: all but the output layer."""


_LARGE_ENOUGH_FOR_LORA = 50_000_000
_ITERATIONS_WITH_ADAPTERS = 2


def _learning_rate(parameters: int, has_adapters: bool) -> float:
    """Return the rate of `trainer.learning_rate: None`. docs/decisions/0027 has the
    measurements."""
    if has_adapters:
        return 2e-4 if parameters < 2_000_000_000 else 1e-4
    if parameters < 50_000_000:
        return 5e-5
    return 1e-5 if parameters < 400_000_000 else 1e-6


class Trainer(Section):
    """GRPO with swarm sampling (SAPO, arXiv 2509.08721). Names and meaning are GRPOConfig's where
    it has them."""

    local_groups: Annotated[int, Field(ge=0)] = 5
    """I: groups of its own that a node trains on in a round."""
    external_groups: Annotated[int, Field(ge=0)] = 4
    """J: groups of its peers that a node trains on in a round."""
    fill_missing: bool = True
    """When there are fewer than J external groups with a signal, take more local ones (and the
    other way round)."""
    external_completions: Literal["better", "all"] = "better"
    """Which completions of a peer's group are learned from: those better than the group's mean, or
    all, as in SAPO."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """None: 2e-4 for adapters (1e-4 in models of 2 billion parameters and more); for all weights
    1e-6, in models of less than 400 million parameters 1e-5, of less than 50 million 5e-5."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from 0. `constant` has none."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    max_steps: Positive | None = None
    """Steps over which `linear` and `cosine` fall to 0. They need it; the others do not."""
    num_iterations: Positive | None = None
    """Optimizer passes over one round's batch. None: 2 for adapters, 1 for all weights."""
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    """Clip range below."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = 0.28
    """Clip range above. None: the same as `epsilon`."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term against the reference model. 0: no reference model is loaded."""
    importance_sampling_correction: bool = True
    """Weigh our own answers by how much likelier the trainer finds them than the engine that
    sampled them (TRL's vllm_importance_sampling_correction). Peers' answers always weigh 1."""
    importance_sampling_mode: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "token_truncate_sequence_mask",
    ] = "sequence_mask"
    """One ratio for each token, or one for the whole answer; those out of bounds are cut off there
    (truncate), or become 0 (mask). TRL's modes and default; the last one is ours: tokens' ratios
    are cut off, and answers whose own ratio is out of bounds are left out."""
    importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = 3.0
    """Largest ratio. None: no upper bound."""
    importance_sampling_clip_min: Annotated[float, Field(ge=0)] | None = None
    """Smallest ratio. None: no lower bound."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    scale_rewards: Literal["group", "none"] = "group"
    """group: advantages are divided by the group's standard deviation."""
    mask_truncated_completions: bool = False
    max_tokens_per_micro_batch: Positive = 16384
    """At most this many tokens (prompts and completions) in one forward and backward pass. How many
    it is, the node measures when it first starts; it remembers that in `budget.json` of its state
    folder."""
    lora: Lora | Literal["auto"] | None = "auto"
    """Train low-rank adapters (peft) of `rank` (16), scaled by `alpha` (32) / rank, in the linear
    layers that `target_modules` names (none: in all but the output layer), and leave the weights as
    they are. None: train all weights. auto: adapters in models of 50 million parameters and more; a
    node that has checkpoints goes on with what they contain. Going from one to the other means to
    start from the beginning."""
    max_nonfinite_steps: Positive = 10
    """Stop with a reason after this many non-finite steps in a row."""

    def lora_for(self, parameters: int) -> Lora | None:
        """The adapters that a model of this many parameters gets."""
        if self.lora == "auto":
            return Lora() if parameters >= _LARGE_ENOUGH_FOR_LORA else None
        return self.lora

    def settle(self, parameters: int) -> Self:
        """These settings with what depends on the model's size decided."""
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
        if self.lr_scheduler_type in ("linear", "cosine") and self.max_steps is None:
            raise ValueError(f"lr_scheduler_type {self.lr_scheduler_type} needs max_steps")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and lr_scheduler_type constant, which has"
                " none; expected lr_scheduler_type constant_with_warmup"
            )
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
        return self


class Swarm(Section):
    """The peer-to-peer part: libp2p, the DHT, the exchange of groups."""

    enabled: bool = True
    """False: train alone, on purpose."""
    host: str = "0.0.0.0"  # noqa: S104 - a peer-to-peer node listens to its peers
    """Address to listen on."""
    port: Port = 0
    """TCP port of libp2p. 0: the kernel chooses."""
    announce: tuple[Multiaddr, ...] = ()
    """Addresses told to others, such as /ip4/100.64.0.7/tcp/38000. Empty: those that libp2p finds
    itself."""
    announce_interface: Annotated[str, Field(pattern=r"^[^\s/]{1,15}$")] | None = None
    """Network interface, such as tailscale0 or wg0, whose address at the start is told to others,
    with `port`."""
    reachability: Literal["auto", "public", "private"] = "auto"
    """Whether others can connect to this node. private: it stands behind a router or firewall, so
    others reach it through a relay, and from then on directly where hole punching works. public:
    never through a relay. auto: libp2p finds out with the help of its peers, which takes minutes
    and works between public addresses only."""
    relays: tuple[PeerMultiaddr, ...] = ()
    """Relays to use where one is needed. Empty: the bootnodes."""
    relay_others: bool = False
    """Be a relay for others. It takes `reachability: public`."""
    map_port: bool = False
    """Ask the router for an open port (UPnP, NAT-PMP)."""
    bootnodes: tuple[PeerMultiaddr, ...] = ()
    """Peers to join the DHT through, besides those that the chain names and those remembered from
    before; each with its /p2p/ and peer id."""
    startup_timeout_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Patience for the libp2p daemon to start. Training never waits for it."""
    peers_per_round: Annotated[int, Field(ge=0, le=64)] = 4
    """k: peers drawn at random in each round to get groups from."""
    draw_families: Weight = 1.0
    """Degree to which the draw prefers peers that have more of our task families. 0: not at all; 2:
    quadratically."""
    draw_fresh: Weight = 0.5
    """Degree to which it prefers peers that spoke to us lately. 0: not at all."""
    draw_useful: Weight = 0.5
    """Degree to which it prefers peers whose groups had a signal (rewards that differ) before. 0:
    not at all."""
    max_askers: Annotated[int, Field(gt=0, le=48)] = 32
    """Peers that are served at the same time; others are told who else holds our groups, or to ask
    somebody else."""
    only_peers: tuple[PeerId, ...] = ()
    """Exchange groups with these peers only, such as the fleet's own (peer ids, as in
    `status.json`). Empty: anyone."""
    only_registered: bool = False
    """Exchange groups only with peers that are registered on the chain."""
    collect_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Time to wait for the drawn peers' groups after our own are served."""
    keep_rounds: Annotated[int, Field(gt=0, le=1000)] = 3
    """How many rounds of our own groups stay served to peers."""
    audit_rounds: Annotated[int, Field(gt=0, le=100_000)] = 64
    """How many rounds of our own signed groups stay on the disk, served to whoever audits our
    rewards (about 12 KB a round with the tiny model, a few hundred KB with long answers)."""
    announce_every_seconds: Annotated[float, Field(ge=1, le=900)] = 60.0
    """Interval in which the membership record is renewed in the DHT; it expires after three times
    that."""
    max_groups_per_peer: Annotated[int, Field(gt=0, le=256)] = 64
    max_completion_bytes: Annotated[int, Field(gt=0, le=500_000)] = 16384
    """A peer's completion that is longer than this is refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.relay_others and self.reachability != "public":
            raise ValueError(
                f"relay_others is set and reachability is {self.reachability}: a relay has to be"
                " public"
            )
        if self.announce_interface is not None and self.port == 0:
            raise ValueError(
                "announce_interface is set and port is 0; expected a port that can be told to"
                " others"
            )
        return self


class Chain(Section):
    """The chain: any EVM JSON-RPC with our coordinator contract, or with one that has its ABI."""

    rpc_url: Urls | None = None
    """One JSON-RPC address, or a list of them: the next one is used when one fails. None: through
    the account service (`account_url`/rpc); without that either there is no chain: the node counts
    its rounds itself and earns nothing."""
    id: Positive = 31337
    """The chain id that `rpc_url` must answer with. An address that answers with another one is not
    used."""
    contract: Address | None = None
    """Address of the swarm coordinator contract. None: as `deployment_file`, or else the account
    service, says."""
    deployment_file: Path | None = None
    """What `hivewright chain deploy` wrote: JSON with rpc_url, chain_id and contract. For roles on
    the chain's host."""
    contract_block: Annotated[int, Field(ge=0)] | None = None
    """The block in which the contract was made: its log is read from there. None: as
    `deployment_file` says, else found by asking the chain, which needs a node that still has the
    state of that time."""
    account_url: Url | None = None
    """The account service, which signs and sends for this node."""
    account_token_file: Path | None = None
    """File with this node's token for the account service. None: `account.token` in the state
    folder."""
    enrolment_token_file: Path | None = None
    """File with the fleet's enrolment token, read once by `hivewright enrol`."""
    org_id: str = "hivewright"
    """Names the account at the account service (`orgId` of the login API)."""
    timeout_seconds: Seconds = 10.0
    """Patience for one answer of the chain or the account service."""
    poll_seconds: Seconds = 2.0
    """Interval in which the round is read while waiting for the next one."""
    max_gas_price_gwei: Annotated[float, Field(gt=0)] | None = None
    """The most that a transaction offers for its gas, in 10^9 wei. A price that a node refuses as
    too low is raised up to this. None: up to five times what the chain asks for."""
    wallet_dir: Path | None = None
    """Folder of a wallet of this node's own, for a node without an account service: `wallet.json`,
    an encrypted keystore that `hivewright enrol` makes, and the journal of its transactions."""
    wallet_password_file: Path | None = None
    """File with the wallet's password, such as a systemd credential: /run/credentials/UNIT/NAME."""
    submit_every_rounds: Positive | None = 1
    """Rewards are sent to the chain when this many rounds wait; the ledger has them from the first
    second. None: by `submit_every_minutes` alone."""
    submit_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Rewards are sent at the latest when the oldest has waited so long. None: by
    `submit_every_rounds` alone."""

    @property
    def rpc_urls(self) -> tuple[str, ...]:
        """The addresses of `rpc_url`; none if it is not set."""
        return (self.rpc_url,) if isinstance(self.rpc_url, str) else self.rpc_url or ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.submit_every_rounds is None and self.submit_every_minutes is None:
            raise ValueError(
                "submit_every_rounds and submit_every_minutes are both None: nothing would ever be"
                " sent"
            )
        if self.wallet_dir is None:
            return self
        if self.account_url is not None:
            raise ValueError(
                "account_url and wallet_dir are both set: who shall sign? take one of them away"
            )
        if self.wallet_password_file is None:
            raise ValueError(
                "wallet_dir is set and wallet_password_file is not; expected a file with its"
                " password"
            )
        if self.rpc_url is None and self.deployment_file is None:
            raise ValueError(
                "wallet_dir is set, rpc_url and deployment_file are not: a wallet needs a chain of"
                " its own"
            )
        return self


class Anvil(Section):
    """The embedded chain (`hivewright chain up`)."""

    host: str = "127.0.0.1"
    port: Port = 8545
    state_file: Path = Path("/var/lib/hivewright/chain/state.json")
    block_seconds: Annotated[int, Field(ge=3)] = 3600
    """A block is made at once when there are transactions; so often without any."""
    history_blocks: Annotated[int, Field(ge=64)] = 4096
    """Receipts, logs and call data of this many of the newest blocks are kept; the contract's state
    is kept forever. Audits need those of `audit.rounds`, at most two blocks for each node in each
    round."""
    binary: Path | None = None
    """The anvil program. None: the one that `make` or the deploy installed."""


class Account(Section):
    """The account service: one key, one queue of transactions for all the fleet's nodes."""

    host: Host = "127.0.0.1"
    port: Port = 3000
    state_dir: Path = Path("/var/lib/hivewright/account")
    """Holds the account's key, the token secret and the transaction journal."""
    names: tuple[Host, ...] = ()
    """Names in the DNS under which browsers may reach it, besides its addresses and the host's own
    name."""
    enrolment_token_file: Path | None = None
    """File with the token that new nodes show once. None: enrolment is closed."""
    behind_proxy: bool = False
    """Whether what comes from this machine came through a proxy that names its client in
    X-Forwarded-For, as `tailscale serve` does: wrong tokens are then counted for that client. A
    deploy sets it with `tailscale_serve`."""
    rpc_proxy: bool = True
    """Serve reads of the contract, and signed transactions to it, as JSON-RPC at /rpc, to callers
    with a node's token: for nodes without a route to the chain."""


class Dashboard(Section):
    """The page about the swarm: rounds, peers, rewards. Reads the chain, as often as
    `chain.poll_seconds` says."""

    host: Host = "127.0.0.1"
    """Where it listens; at 127.0.0.1 in any case. Whoever reaches it may look: it has no login, and
    no secrets."""
    port: Port = 3001
    state_dir: Path = Path("/var/lib/hivewright/dashboard")
    """Holds `address`, the page's URL."""
    names: tuple[Host, ...] = ()
    """Names in the DNS under which browsers may reach it, besides its addresses and the host's own
    name."""
    audit_file: Path | None = None
    """The report of an audit, such as the keeper's `audit/audit.json`, whose verdicts are shown.
    None: none are."""
    count_unaudited: bool = True
    """Whether peers are ranked by all rewards that the contract has (unaudited ones are marked), or
    only by those that the report in `audit_file` has found to be earned. Audits draw a sample:
    raise `audit.sample` for the latter."""

    @model_validator(mode="after")
    def _check_counted(self) -> Self:
        if not self.count_unaudited and self.audit_file is None:
            raise ValueError(
                "count_unaudited is false and audit_file is not set; expected the report of an"
                " audit"
            )
        return self


class Keeper(Section):
    """Advances the swarm's rounds and publishes its bootnodes."""

    state_dir: Path = Path("/var/lib/hivewright/keeper")
    """Holds the contract owner's key (owner.key), deployment.json, status.json, and what the keeper
    published."""
    round_seconds: Seconds = 600.0
    """A round ends at the latest after this time, whoever has reported."""
    min_round_seconds: Annotated[float, Field(ge=0)] = 0.0
    """A round lasts at least this long."""
    ready_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A round ends when this share (rounded up) of the peers that reported in one of the two rounds
    before it has reported. New peers don't hold it up; those that are gone do so for two rounds,
    until their time is up."""
    min_peers: Positive = 1
    """No round ends before this many peers are registered, and none by readiness before this many
    have reported."""
    publish_bootnodes: tuple[Multiaddr, ...] = ()
    """Bootnode addresses that the keeper publishes on the chain. It withdraws those that it
    published and that are no longer named here; bootnodes that somebody else added stay."""
    bootnode_file: Path | None = None
    """File with the address of a bootnode next to the keeper (`multiaddr` in its state folder),
    published like those."""
    poll_seconds: Seconds = 1.0
    """Interval in which the chain is looked at."""


class Audit(Section):
    """Holds submitted rewards against the groups that their peers signed (`hivewright audit`, and
    the keeper)."""

    state_dir: Path | None = None
    """Holds audit.json, the evidence of contradictions, and the auditor's own key. None: `audit` in
    `keeper.state_dir`."""
    every_rounds: Annotated[int, Field(ge=0)] = 10
    """The keeper audits after every N rounds, in a process of its own. 0: it does not. It can judge
    the task families of `environment.families` alone, so these are to be the swarm's; a deploy adds
    those of its workers."""
    rounds: Positive = 16
    """How many of the newest rounds are looked at. Peers keep `swarm.audit_rounds`."""
    sample: Positive = 32
    """At most this many rewards, drawn at random, are recomputed in one audit."""
    timeout_seconds: Seconds = 120.0
    """Time that one audit looks for peers and asks them."""


class Bootnode(Section):
    """A DHT peer with a stable identity and address (`hivewright bootnode`)."""

    state_dir: Path = Path("/var/lib/hivewright/bootnode")
    host: str = "0.0.0.0"  # noqa: S104
    port: Port = 38331
    announce: tuple[Multiaddr, ...] = ()
    relay_others: bool = True
    """Be a relay for nodes that others can't connect to: at most 128 of them, with 16 connections
    each."""


class Hub(Section):
    """The model on the Hugging Face Hub. Nothing is pushed without a `token_file`."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] | None = None
    """Where to: OWNER/NAME, or OWNER alone: then each node has a repository of its own, named after
    model and node."""
    token_file: Path | None = None
    """File with a Hugging Face token that may write."""
    every_rounds: Positive = 100
    """Rounds trained between two pushes, each of a finished checkpoint; whether the last one failed
    changes nothing."""
    private: bool = False
    """Whether a repository that is made here is private."""
    endpoint: Url = "https://huggingface.co"
    timeout_seconds: Seconds = 3600.0
    """Patience for one upload, which goes on during training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.token_file is not None and self.repo is None:
            raise ValueError(
                "token_file is set and repo is not: where shall the model go? expected repo:"
                " OWNER/NAME"
            )
        return self


class Log(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


class Settings(Section):
    """One settings file. Every role reads the sections that concern it."""

    version: int = SETTINGS_VERSION
    node: Node = Node()
    model: Model = Model()
    environment: Environment = Environment()
    generation: Generation = Generation()
    trainer: Trainer = Trainer()
    swarm: Swarm = Swarm()
    chain: Chain = Chain()
    anvil: Anvil = Anvil()
    account: Account = Account()
    dashboard: Dashboard = Dashboard()
    keeper: Keeper = Keeper()
    audit: Audit = Audit()
    bootnode: Bootnode = Bootnode()
    hub: Hub = Hub()
    log: Log = Log()

    @model_validator(mode="after")
    def _check(self) -> Self:
        chain = self.chain
        if self.swarm.only_registered and not (
            chain.rpc_url or chain.account_url or chain.deployment_file
        ):
            raise ValueError(
                "swarm.only_registered needs a chain; expected chain.account_url or chain.rpc_url"
            )
        return self


def chain_of_node(chain: Chain, state_dir: Path) -> Chain:
    """`chain` with the file of the node's token named, which is in its state folder unless the
    settings say where."""
    if chain.account_url is None or chain.account_token_file is not None:
        return chain
    return chain.model_copy(update={"account_token_file": state_dir / ACCOUNT_TOKEN_FILE})


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def parse(raw: dict[str, Any], source: str) -> Settings:
    """Check nested settings.

    Raises SettingsError with one line that names `source` and everything that is wrong, each with
    key, value and expectation.
    """
    version = raw.get("version", SETTINGS_VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > SETTINGS_VERSION:
        raise SettingsError(
            f"{source}: version: {version} is newer than {SETTINGS_VERSION}, the newest that this"
            " hivewright reads; upgrade hivewright, or write the file with this one"
        )
    try:
        # JSON mode: strict, and yet a path is a string and a tuple a list, as in YAML.
        return Settings.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise SettingsError.of(source, [_explain(e) for e in _causes(error)]) from None
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{source}: {error}; expected plain YAML values") from None


def from_flat(flat: dict[str, Any], source: str) -> Settings:
    """Check flat inventory keys (`trainer_learning_rate`), as `parse` does; what is wrong is named
    by these keys."""
    if mistakes := flat_mistakes(flat):
        raise SettingsError.of(source, mistakes)
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition("_")
        nested.setdefault(section, {})[name] = value
    return parse(nested, source)


def flat_mistakes(flat: dict[str, Any]) -> list[str]:
    """Everything that is wrong with flat inventory keys, a message for each mistake. Empty:
    `from_flat` takes them."""
    nested: dict[str, Any] = {}
    mistakes = []
    for key, value in flat.items():
        section, _, name = key.partition("_")
        if section not in SECTIONS or not name:
            close = difflib.get_close_matches(key, flat_keys(), n=1)
            mistakes.append(f"{key}: not a known key{_hint(close)}")
            continue
        try:
            nested.setdefault(section, {})[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            mistakes.append(
                f"{key}: got {_short(value)}; expected plain text, numbers, lists and dicts"
            )
    try:
        Settings.model_validate_json(json.dumps(nested))
    except ValidationError as error:
        mistakes += [_explain(e, joint="_") for e in _causes(error)]
    return mistakes


def flat_keys() -> list[str]:
    """All inventory keys that become settings."""
    return [
        f"{section}_{name}" for section, model in SECTIONS.items() for name in model.model_fields
    ]


def load(path: Path) -> Settings:
    """Read a settings file. Raises SettingsError, with one line, for whatever is wrong with it."""
    source = f"settings file {path}"
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise SettingsError(f"{source}: is a device or a pipe; expected a YAML file")
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise SettingsError(
                f"{source}: has {path.stat().st_size:,} bytes; expected at most {MAX_FILE_BYTES:,}"
            )
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{source}: can't be read: {reason}; expected a YAML file") from None
    try:
        raw = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise SettingsError(
            f"{source}: is nested too deep; expected sections such as `node:`"
        ) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise SettingsError(
            f"{source}: not YAML{line}: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from None
    if raw is None:
        raise SettingsError(
            f"{source}: is empty; expected sections such as `node:` (docs/configuration.md lists"
            " them)"
        )
    if not isinstance(raw, dict):
        raise SettingsError(
            f"{source}: got a {type(raw).__name__}; expected sections such as `node:`"
        )
    return parse(raw, source)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would let the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def dump(settings: Settings) -> str:
    """YAML text that `load` reads back to the same settings. Only departures from the defaults are
    written."""
    data = settings.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"version": settings.version, **data}, sort_keys=False)


def _causes(error: ValidationError) -> list[Any]:
    """Without those that only follow from others: a list is too short if its one item is wrong."""
    errors = error.errors()
    places = [e["loc"] for e in errors]
    return [
        e
        for e in errors
        if not any(len(p) > len(e["loc"]) and p[: len(e["loc"])] == e["loc"] for p in places)
    ]


def _explain(error: Any, joint: str = "/") -> str:
    """`joint`: between a section and its key; "_" where settings are written as flat inventory
    keys."""
    location = [str(part) for part in error["loc"]]
    path = "/".join([joint.join(location[:2]), *location[2:]]) or "settings"
    if error["type"] == "extra_forbidden":
        known = list(SECTIONS)
        if len(location) > 1 and location[0] in SECTIONS:
            known = list(SECTIONS[location[0]].model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        is_flat_key = joint == "_" and len(location) == 2
        return (
            f"{path}: not a known"
            f" key{_hint([f'{location[0]}_{name}' for name in close] if is_flat_key else close)}"
        )
    if error["type"] == "value_error":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "string_pattern_mismatch":
        expected = form(error["ctx"]["pattern"])
    elif error["type"] == "too_short":
        expected = f"at least {error['ctx']['min_length']} of them"
    else:
        expected = plainly(error["msg"].removeprefix("Input should be "))
    advice = _advice(error["type"], error["input"], is_yaml=joint == "/")
    return f"{path}: got {_short(error['input'])}; expected {expected}{advice}"


# Patterns of text in settings and inventories, in words.
_FORMS = {
    _URL: "http:// or https:// and an address",
    r"^https?://[^\s]+$": "http:// or https:// and an address",
    r"^0x[0-9a-fA-F]{40}$": "0x and 40 hexadecimal digits",
    f"^{multiaddr.PEER_ID}$": "a peer id, such as QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$": (
        "at most 63 letters, digits, dots, hyphens and underscores, first no dot"
    ),
    r"^(auto|cpu|cuda(:\d+)?)$": "auto, cpu, cuda, or cuda:0 and so on",
    r"^[^\s/]{1,15}$": "a network interface, such as eth0: at most 15 characters",
    r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$": (
        "owner/name, or owner alone, on the Hugging Face Hub"
    ),
    r"^(pip|(https?|file)://\S+)$": "pip, or a URL of an index (https://, http:// or file://)",
    r"^tag:[A-Za-z][A-Za-z0-9-]*$": "tag: and letters, digits and hyphens, such as tag:gpu",
    r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$": (
        "at most 63 lower-case letters, digits and hyphens, no hyphen at the ends"
    ),
}
_PLAIN = (
    ("a valid array", "a list"), ("a valid list", "a list"), ("a valid dictionary", "a dict of keys"),
    ("an object", "a mapping"), ("a valid string", "text"), ("a valid boolean", "True or False"),
    ("a valid integer", "a whole number"), ("a valid number", "a number"), ("a valid tuple", "a list"),
)  # fmt: skip


def form(pattern: str) -> str:
    """Return what text has to look like, in words."""
    return _FORMS.get(pattern, f"text of the form {pattern}")


def plainly(expected: str) -> str:
    """Return what pydantic expects, in words of an inventory or a settings file."""
    for theirs, ours in _PLAIN:
        expected = expected.replace(theirs, ours)
    return expected


def _advice(kind: str, value: Any, is_yaml: bool) -> str:
    """YAML 1.1 reads 1e-5 as text, and 0x... as a number; an inventory is Python."""
    if kind == "float_type" and isinstance(value, str) and _is_number(value):
        if not is_yaml:
            return "; write it without quotes"
        return "; YAML takes it for text: write it with a point and without quotes, such as 1.0e-5"
    if kind == "string_type" and isinstance(value, int):
        return "; put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _hint(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else "; docs/configuration.md lists all keys"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

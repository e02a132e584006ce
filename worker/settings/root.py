"""All sections together, and the sections about the Hub, log, metrics and trackers."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from worker.settings.chain_sections import (
    Account,
    Anvil,
    Audit,
    Chain,
    Dashboard,
    Judge,
    Keeper,
    Market,
)
from worker.settings.node_sections import Environment, Generation, Model, Node
from worker.settings.swarm_sections import Bootnode, Swarm
from worker.settings.training_sections import Trainer
from worker.settings.value_types import Host, Port, Positive, Seconds, Section, Url

SETTINGS_VERSION = 1

_HUB_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]*"


class Hub(Section):
    """The model on the Hugging Face Hub. Without a `token_file` nothing is pushed."""

    repo: Annotated[str, Field(pattern=f"^{_HUB_NAME}(/{_HUB_NAME})?$")] | None = None
    """Repository to push to: OWNER/NAME; or OWNER, and each node has a repository of its own, named
    after model and node."""
    token_file: Path | None = None
    """File with a Hugging Face token that may write."""
    every_rounds: Positive = 100
    """Trained rounds between two pushes of the newest checkpoint, even if the last one failed."""
    private: bool = False
    """Make new repositories private."""
    endpoint: Url = "https://huggingface.co"
    """Address of the Hub."""
    timeout_seconds: Seconds = 3600.0
    """Longest duration of an upload, in seconds. Training continues meanwhile."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.token_file is not None and self.repo is None:
            raise ValueError(
                "token_file is set and repo is not; expected repo: OWNER/NAME, or OWNER"
            )
        return self


class Log(Section):
    """The log."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level to log."""
    format: Literal["text", "json"] = "text"
    """Format of a line."""


class Metrics(Section):
    """The endpoint of a process for Prometheus: http://HOST:PORT/metrics, without a password."""

    host: Host = "127.0.0.1"
    """Address to listen on. Loopback, or an address of a private network (VPN)."""
    port: Port | None = None
    """TCP port. None: no endpoint. In a fleet it is the port of slot 0; slot N has N more, and the
    services of a coordinator have the ports below it (docs/operations/monitoring.md). 0: the kernel
    chooses, and the log has it."""


class Tracking(Section):
    """Trackers of each round's figures, besides `rounds.jsonl`; they write into `STATE_DIR/logs`.

    They need the packages of the extra `trackers`, which a deploy installs where one is on.
    """

    trackio: bool = False
    """Write to trackio's local database (`logs/trackio`)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Write to Weights & Biases: offline into `logs/wandb`, for `wandb sync`, or online."""
    wandb_key_file: Path | None = None
    """File with an API key of Weights & Biases, for `wandb: online`."""
    tensorboard: bool = False
    """Write event files of TensorBoard (`logs/tensorboard`)."""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")] = "hivewright"
    """Name of the project in the trackers."""

    @property
    def is_on(self) -> bool:
        """Return whether any tracker is on."""
        return self.trackio or self.tensorboard or self.wandb != "off"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.wandb == "online" and self.wandb_key_file is None:
            raise ValueError("wandb is online and wandb_key_file is not set; expected a file")
        return self


class Settings(Section):
    """One settings file. Every role reads the sections that it needs."""

    version: Positive = SETTINGS_VERSION
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
    market: Market = Market()
    judge: Judge = Judge()
    keeper: Keeper = Keeper()
    audit: Audit = Audit()
    bootnode: Bootnode = Bootnode()
    hub: Hub = Hub()
    log: Log = Log()
    metrics: Metrics = Metrics()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check(self) -> Self:
        has_chain = self.chain.rpc_url or self.chain.account_url or self.chain.deployment_file
        if self.swarm.only_registered and not has_chain:
            raise ValueError(
                "swarm.only_registered needs a chain; expected chain.account_url or chain.rpc_url"
            )
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

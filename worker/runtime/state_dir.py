"""Names of the files and folders in a node's state folder (`node.state_dir`).

No other module names them. The names must not change, because state folders and backups of earlier
versions have them too.
"""

from pathlib import Path
from typing import overload


class _Entry:
    """A path on an instance of StateDir, and the plain name on the class."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> str: ...

    @overload
    def __get__(self, instance: "StateDir", owner: type) -> Path: ...

    def __get__(
        self,
        instance: "StateDir | None",
        owner: type,
    ) -> str | Path:
        return self._name if instance is None else instance.folder / self._name


class StateDir:
    """Paths in one node's folder; on the class, `StateDir.ledger`, the name within any folder."""

    identity = _Entry("swarm.pem")
    """The libp2p key; it is created once and never replaced (worker/swarm/identity.py)."""
    enrolment = _Entry("enrolment.json")
    account_token = _Entry("account.token")
    account_address = _Entry("account.address")
    """The account of a node at a login server of RL Swarm (worker/chain/login_server.py)."""
    wallet = _Entry("wallet")
    """Folder of a node with its own wallet."""
    model_choice = _Entry("model.json")
    """The model that was chosen for this machine (worker/policy/model_sizing.py)."""
    form = _Entry("form.json")
    """The prompt form (worker/model_setup.py)."""
    rows = _Entry("rows.json")
    """Batch size of generation (worker/policy/engines/batching.py)."""
    budget = _Entry("budget.json")
    """Size of the micro-batch (worker/trainer/micro_batch.py)."""
    memory_killed = _Entry("memory-killed")
    """Marker that the systemd unit creates when the kernel OOM-killed the worker."""
    checkpoints = _Entry("checkpoints")
    """Folder of the trainer's state (worker/trainer/checkpoint.py)."""
    weights = _Entry("weights")
    """Folder of weights that we offer, and of those that come from peers (worker/adoption.py)."""
    ledger = _Entry("ledger.db")
    """Rewards, until they are on the chain (worker/chain/ledger.py)."""
    bets = _Entry("bets.db")
    """Bets in the prediction market (worker/market/journal.py)."""
    market_record = _Entry("logs/prg_record.txt")
    """A line for each of these bets, unless `market.record_file` is set."""
    groups = _Entry("groups")
    """Folder of our signed groups, for audits (worker/swarm/exchange/archive.py)."""
    peers = _Entry("peers.json")
    """Port and peers for the next start (worker/swarm/discovery/peer_cache.py)."""
    status = _Entry("status.json")
    rounds = _Entry("rounds.jsonl")
    """One line per part of a round (worker/telemetry/status.py)."""
    evaluations = _Entry("evaluations.jsonl")
    """One line per evaluation (worker/telemetry/evaluation_log.py)."""
    answers = _Entry("answers")
    """Folder of readable questions and answers (worker/telemetry/answer_log.py)."""
    logs = _Entry("logs")
    """Folder of trackers (worker/telemetry/tracking/)."""
    hub = _Entry("hub")
    """Folder of the running push to the Hub (worker/hub/hub.py)."""
    lock = _Entry("lock")
    """Locked by the process that works here; contains its process id (worker/runtime/host.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

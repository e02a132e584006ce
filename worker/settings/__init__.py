"""Settings of all roles: typed, immutable, strict. Every default is defined here and nowhere else.

Flat inventory keys (`trainer_learning_rate`) are checked by `from_flat` on the operator's machine
before any host is changed, written by `dump` into /etc/hivewright/*.yaml, and read by `load` in the
role. A secret is never a setting; a setting may name the file that contains one. Hyper-parameters
have the names and the meaning of TRL's GRPOConfig.

The package imports nothing heavy, because the operator's machine imports it too.
"""

from worker.settings.chain_sections import (
    Account,
    Anvil,
    Audit,
    Chain,
    Dashboard,
    Judge,
    Keeper,
    Market,
    chain_of_node,
)
from worker.settings.explanations import form, plainly
from worker.settings.node_sections import (
    DEFAULT_FAMILIES,
    Environment,
    Family,
    Generation,
    Model,
    Node,
    split_family,
)
from worker.settings.root import SECTIONS, SETTINGS_VERSION, Hub, Log, Settings, Tracking
from worker.settings.settings_files import (
    MAX_FILE_BYTES,
    dump,
    flat_keys,
    flat_mistakes,
    from_flat,
    load,
    parse,
)
from worker.settings.swarm_sections import Bootnode, Swarm
from worker.settings.training_sections import Lora, Trainer
from worker.settings.value_types import Section, is_host

__all__ = [
    "DEFAULT_FAMILIES",
    "MAX_FILE_BYTES",
    "SECTIONS",
    "SETTINGS_VERSION",
    "Account",
    "Anvil",
    "Audit",
    "Bootnode",
    "Chain",
    "Dashboard",
    "Environment",
    "Family",
    "Generation",
    "Hub",
    "Judge",
    "Keeper",
    "Log",
    "Lora",
    "Market",
    "Model",
    "Node",
    "Section",
    "Settings",
    "Swarm",
    "Tracking",
    "Trainer",
    "chain_of_node",
    "dump",
    "flat_keys",
    "flat_mistakes",
    "form",
    "from_flat",
    "is_host",
    "load",
    "parse",
    "plainly",
    "split_family",
]

"""Three test hosts on this machine (`make fleet`): h1 is the coordinator, h2 and h3 train.

They have their own network, in which the operator must be too:

    ip netns exec lab-op .venv/bin/pyinfra -y inventory/lab.py deploy.py
"""

from lab.access import operator_access
from worker.environments.presets import DEMO_SETTINGS

_access = operator_access()

coordinators = [("h1", {"ssh_hostname": "10.88.0.11", "account_host": "10.88.0.11"})]
workers = [
    ("h2", {"ssh_hostname": "10.88.0.12", "slots": 1}),
    ("h3", {"ssh_hostname": "10.88.0.13", "slots": 1}),
]

# The same for all: how to get in, what to install, and a swarm that is quick enough to watch on two
# cores.
all = (
    ["h1", "h2", "h3"],
    {
        **_access,
        **DEMO_SETTINGS,
        "keeper_min_peers": 2,
        "keeper_round_seconds": 30.0,
        # Between rounds the workers rest, and audits, which load torch, are seldom: the machine has
        # other things to do.
        "keeper_min_round_seconds": 3.0,
        "audit_every_rounds": 50,
        "node_max_parts_per_round": 1,
    },
)

"""This machine alone: a whole coordinator and a worker, from the last commit of the checkout.

    .venv/bin/pyinfra -y inventory/local.py deploy.py

Uncommitted changes are not deployed. Only the bootnode and the worker's libp2p port listen to other
machines.
"""

import os
from pathlib import Path

_checkout = Path(__file__).resolve().parents[1]

coordinators = ["@local"]
workers = ["@local"]

all = (
    ["@local"],
    {
        "_sudo": os.geteuid() != 0,
        "release_repository": str(_checkout),
        "release_ref": "HEAD",
        "secrets_dir": "secrets/local",
        "slots": 1,
    },
)

"""This machine, all of it: a whole coordinator and a worker, from the last commit of the checkout.

    .venv/bin/pyinfra -y inventory/local.py deploy.py

What is not committed is not deployed. Nothing listens to other machines but the bootnode and the
worker's libp2p port.
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

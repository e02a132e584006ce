"""The Tailscale part of deploy.py by itself, for hosts that have everything else."""

import os
from pathlib import Path

from pyinfra import host

from deploys import tailscale, tailserve, tailssh
from deploys.deployment import Deployment

if "STAND_IN" in os.environ:
    # The stand-in's folder: nothing is written where a deploy would.
    tailserve.SERVED = Path(os.environ["STAND_IN"]) / "served"
if "CONFIRM_SECONDS" in os.environ:
    tailssh.CONFIRM_SECONDS = int(os.environ["CONFIRM_SECONDS"])
tailscale.join_tailnet(Deployment(**{k: v for k, v in host.data.dict().items() if k in Deployment.model_fields}))

"""The Tailscale part of deploy.py, for hosts that have everything else."""

import os
from pathlib import Path

from pyinfra import host

from deploys.inventory.schema import Deployment
from deploys.tailscale import join, serve_ports, ssh_switch

if "STAND_IN" in os.environ:
    # The stand-in's folder: nothing is written where a deploy would.
    serve_ports.SERVED = Path(os.environ["STAND_IN"]) / "served"
if "CONFIRM_SECONDS" in os.environ:
    ssh_switch.CONFIRM_SECONDS = int(os.environ["CONFIRM_SECONDS"])
join.join_tailnet(
    Deployment(**{k: v for k, v in host.data.dict().items() if k in Deployment.model_fields})
)

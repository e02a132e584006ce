"""The Tailscale part of deploy.py by itself, for hosts that have everything else."""

import os
from pathlib import Path

from pyinfra import host

from deploys import tailscale
from deploys.deployment import Deployment

# The stand-in's folder, which is first in the path: nothing is written where a deploy would.
tailscale.SERVED = Path(os.environ["PATH"].split(":")[0]) / "served"
tailscale.join_tailnet(Deployment(**{k: v for k, v in host.data.dict().items() if k in Deployment.model_fields}))

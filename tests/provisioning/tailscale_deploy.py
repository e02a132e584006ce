"""The Tailscale part of deploy.py by itself, for hosts that have everything else."""

from pyinfra import host

from deploys import tailscale
from deploys.deployment import Deployment

tailscale.join_tailnet(Deployment(**{k: v for k, v in host.data.dict().items() if k in Deployment.model_fields}))

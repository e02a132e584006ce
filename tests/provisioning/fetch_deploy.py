"""The part of deploy.py that fetches a model."""

from pyinfra import host

from deploys import worker
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry

KEYS = ("model_name", "model_token_file", "slots", "swarm_enabled")
data = {key: host.data.get(key) for key in KEYS}
slot = validation.check([HostEntry(host.name, ("workers",), data)])[host.name].slots[0]
worker.fetch(name="Fetch the model of slot 0", slot=slot, digest="new", _timeout=60)

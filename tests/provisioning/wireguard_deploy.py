"""The WireGuard part of deploy.py."""

from pyinfra import host, inventory

from deploys import wireguard
from deploys.inventory import planning

if host.name not in planning._planned:  # config.py makes plans for deploy.py alone
    planning.make(inventory)
wireguard.join_mesh(planning.current())

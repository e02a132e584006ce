"""The WireGuard part of deploy.py, by itself, for the tests."""

from pyinfra import host, inventory

from deploys import plan, wireguard

if host.name not in plan._planned:  # config.py makes plans for deploy.py alone
    plan.make(inventory)
wireguard.join_mesh(plan.current())

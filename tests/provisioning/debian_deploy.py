"""The part of deploy.py without a release: packages, user, folders, WireGuard, units."""

from pyinfra import host, inventory

from deploys import system, units, wireguard
from deploys.inventory import planning
from deploys.services import COORDINATOR_UNITS, ENROL_UNIT, WORKER_UNIT

if host.name not in planning._planned:  # config.py makes plans for deploy.py alone
    planning.make(inventory)
this = planning.current()
system.prepare_system(is_coordinator=True)
wireguard.join_mesh(this)
for unit in host.loop([WORKER_UNIT, ENROL_UNIT, *COORDINATOR_UNITS]):
    units.install_unit(unit, this.host.deployment.watchdog_seconds)

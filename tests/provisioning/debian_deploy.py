"""What of deploy.py needs no release: packages, user, folders, the WireGuard mesh, and every unit. For the tests."""

from pyinfra import host, inventory

from deploys import coordinator_host, system, units, wireguard, worker
from deploys.inventory import planning

if host.name not in planning._planned:  # config.py makes plans for deploy.py alone
    planning.make(inventory)
this = planning.current()
system.prepare_system(is_coordinator=True)
wireguard.join_mesh(this)
for unit in host.loop(
    [worker.UNIT, worker.ENROL_UNIT, *(f"hivewright-{s}.service" for s in coordinator_host.SERVICES)]
):
    units.install_unit(unit, this.host.deployment.watchdog_seconds)

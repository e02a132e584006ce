"""What of deploy.py needs no release: packages, user, folders, the WireGuard mesh, and every unit. For the tests."""

from pyinfra import host, inventory

from deploys import coordinator, plan, system, units, wireguard, worker

if host.name not in plan._planned:  # config.py makes plans for deploy.py alone
    plan.make(inventory)
this = plan.current()
system.prepare_system(is_coordinator=True)
wireguard.join_mesh(this)
for unit in host.loop([worker.UNIT, worker.ENROL_UNIT, *(f"hivewright-{s}.service" for s in coordinator.SERVICES)]):
    units.install_unit(unit, this.host.deployment.watchdog_seconds)

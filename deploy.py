"""`pyinfra -y inventory/NAME.py deploy.py`: deploy every host of an inventory.

config.py has checked the whole inventory before this runs. A second run changes nothing; a run with
another release_ref upgrades.
"""

from pyinfra.context import ctx_host

from deploys import (
    account,
    coordinator_host,
    hardware,
    prefetch,
    release,
    rollback,
    system,
    wireguard,
    worker,
)
from deploys.inventory import planning
from deploys.pyinfra_ext import fact_cache
from deploys.tailscale import join

this = planning.current()

prefetch.ask(this)
fact_cache.lock_before_changes(ctx_host.get())
hardware.refuse_unfit(name="Check that it can be what the inventory says", reason=this.unfit)
system.prepare_system(is_coordinator=bool(this.host.services))
join.join_tailnet(this.host.deployment)
wireguard.join_mesh(this)
digest = rollback.digest(this)
release.fetch_release(this)
rollback.begin(name="Keep what the host is, to go back to", digest=digest)
release.switch_to_release(this)
if this.host.services:
    coordinator_host.configure_coordinator(this)
else:
    coordinator_host.retire_coordinator()
account.await_account(this)
if this.host.slots:
    worker.configure_workers(this)
worker.retire_workers(this)
release.prune(name="Remove releases that are no longer kept")
rollback.finish(name="Note that the host is whole", digest=digest)

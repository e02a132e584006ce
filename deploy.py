"""`pyinfra -y inventory/NAME.py deploy.py`: make every host of the inventory what its line says, and nothing else.

config.py has checked the whole inventory by then. Run again it changes nothing; with another release_ref it upgrades.
"""

from pyinfra.context import ctx_host

from deploys import (
    account,
    ahead,
    coordinator,
    hardware,
    history,
    memory,
    plan,
    release,
    system,
    tailscale,
    wireguard,
    worker,
)

this = plan.current()

ahead.ask(this)
memory.lock_before_changes(ctx_host.get())
hardware.refuse_unfit(name="Check that it can be what the inventory says", reason=this.unfit)
system.prepare_system(is_coordinator=bool(this.host.services))
tailscale.join_tailnet(this.host.deployment)
wireguard.join_mesh(this)
digest = history.digest(this)
release.fetch_release(this)
history.begin(name="Keep what the host is, to go back to", digest=digest)
release.switch_to_release(this)
if this.host.services:
    coordinator.configure_coordinator(this)
else:
    coordinator.retire_coordinator()
account.await_account(this)
if this.host.slots:
    worker.configure_workers(this)
worker.retire_workers(this)
release.prune(name="Remove releases that are no longer kept")
history.finish(name="Note that the host is whole", digest=digest)

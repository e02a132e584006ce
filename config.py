"""Read by pyinfra before anything else."""

from pyinfra import config

from deploys import inventory, report

config.REQUIRE_PYINFRA_VERSION = "==3.10.0"
config.CONNECT_TIMEOUT = 10
inventory.check()
report.name_failed_hosts_at_exit()

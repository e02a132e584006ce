"""Read by pyinfra before anything else."""

from pyinfra import config

from deploys import banners, connection, inventory, report, sudo

config.REQUIRE_PYINFRA_VERSION = "==3.10.0"
config.CONNECT_TIMEOUT = 10
connection.limit_silence()
banners.show()
sudo.check_on_connect()
inventory.check()
report.name_failed_hosts_at_exit()
report.end_with_130_if_interrupted()

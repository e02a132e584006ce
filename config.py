"""Read by pyinfra before anything else."""

from pyinfra import config

from deploys.inventory import loading
from deploys.pyinfra_ext import keepalive, run_report, sudo
from deploys.tailscale import banners

config.REQUIRE_PYINFRA_VERSION = "==3.10.0"
config.CONNECT_TIMEOUT = 10
keepalive.limit_silence()
banners.show()
sudo.check_on_connect()
run_report.report_at_exit()
loading.check()
run_report.end_with_130_if_interrupted()

"""Read by pyinfra before anything else."""

import sys

from pyinfra import config

# pyinfra turns bytecode off, so each of its runs would compile all of the operator's modules again.
# Python's own setting holds (-B, PYTHONDONTWRITEBYTECODE).
sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)

from deploys.inventory import loading  # noqa: E402
from deploys.pyinfra_ext import keepalive, run_report, shortcuts, sudo  # noqa: E402
from deploys.tailscale import banners  # noqa: E402

config.REQUIRE_PYINFRA_VERSION = "==3.10.0"
config.CONNECT_TIMEOUT = 10
shortcuts.install()
keepalive.limit_silence()
banners.show()
sudo.check_on_connect()
run_report.report_at_exit()
loading.check()
run_report.end_with_130_if_interrupted()

"""What people read in a terminal of 80 columns."""

import io

from rich.console import Console

from worker.reports import swarm_table
from worker.telemetry.status import NodeStatus


def node(**changes):
    status = NodeStatus("gpu-12-7", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", **changes)
    status.ledger = {"earned": 9999, "sent": 0, "confirmed": 9999, "rejected": 0}
    return status


def lines(*nodes):
    out = io.StringIO()
    Console(file=out, width=80).print(swarm_table(nodes))
    return out.getvalue().splitlines()


def test_table_fits_80_columns_after_months_and_in_an_outage():
    busy = {
        "round": 12345, "reward_mean": 0.5, "loss": -0.1234, "peers_heard": 4, "groups_local": 9, "groups_external": 9,
        "groups_rejected": {"flood": 1234}, "tokens_per_second": 12345.6, "round_seconds": 599.9,
    }  # fmt: skip
    shown = lines(
        node(chain="ok", state="connected", **busy),
        node(chain="unreachable", state="training-alone", **busy),
        node(chain="unknown", state="starting"),
    )
    assert not any("…" in line for line in shown), shown
    assert max(map(len, shown)) <= 80
    assert "down" in shown[2]
    assert "alone" in shown[2]


def test_name_of_a_stranger_cannot_drive_the_terminal():
    status = node()
    status.name = "\x1b[2Jx"
    assert "\x1b" not in "".join(lines(status))

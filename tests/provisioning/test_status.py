"""The fleet's table."""

from typing import Any

from rich.console import Console

from deploys.fleet.status import status_table

NOW = 1_800_000_000.0


def report(unit: str = "hivewright-worker@0.service", active: str = "active", **changes: Any) -> dict[str, Any]:
    status = {
        "peer_id": "Qm",
        "animal_name": "enormous translucent hippopotamus",
        "state": "training-alone",
        "round": 123456,
        "reward_mean": 0.5,
        "peers_heard": 64,
        "ledger": {"earned": 100000, "sent": 3, "confirmed": 99990, "rejected": 0},
        "updated_at": NOW - 3,
    }
    return {"unit": unit, "active_state": active, "status": status | changes}


def rendered(hosts: list[str], reports: dict[str, list[dict[str, Any]]]) -> tuple[str, bool]:
    table, is_well = status_table(hosts, reports, NOW)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get(), is_well


def test_what_counts_is_readable_at_80_columns() -> None:
    text, is_well = rendered(["gpu-host-12"], {"gpu-host-12": [report()]})
    assert is_well
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in ("gpu-host-12/0", "training-alone", "123456", "0.50", "64", "99990/100000"):
        assert word in text, text


def test_host_that_does_not_answer_is_in_the_table() -> None:
    text, is_well = rendered(["gpu-1", "gpu-2"], {"gpu-1": [report()]})
    assert not is_well
    assert "can't be reached" in text


def test_failed_and_silent_workers_are_not_well() -> None:
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(active="failed")]})
    assert not is_well
    assert "failed" in text
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(updated_at=NOW - 3600)]})
    assert not is_well
    assert "silent 60 min" in text


def test_keeper_says_who_has_reported() -> None:
    keeper = {"state": "round-open", "round": 7, "reporters": 1, "expected": 2, "began_at": NOW}
    text, is_well = rendered(
        ["hub"], {"hub": [{"unit": "hivewright-keeper.service", "active_state": "active", "status": keeper}]}
    )
    assert is_well
    assert "hub/keeper" in text
    assert "1/2" in text

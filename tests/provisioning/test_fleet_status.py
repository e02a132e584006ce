"""The table of `hivewright fleet status`."""

import time
from typing import Any

import pytest
from rich.console import Console

from deploys.fleet import queries, status
from deploys.fleet.status import status_table
from deploys.services import COORDINATOR_UNITS

NOW = 1_800_000_000.0


def report(
    unit: str = "hivewright-worker@0.service", active: str = "active", **changes: Any
) -> dict[str, Any]:
    status: dict[str, Any] = {
        "peer_id": "Qm",
        "animal_name": "enormous translucent hippopotamus",
        "state": "training-alone",
        "round": 123456,
        "reward_mean": 0.5,
        "peers_heard": 64,
        "swarm": {"peers_known": 99},
        "pid": 4711,
        "last_error": None,
        "ledger": {"earned": 100000, "sent": 3, "confirmed": 99990, "rejected": 0},
        "updated_at": NOW - 3,
    }
    return {"unit": unit, "active_state": active, "status": status | changes}


STATE = {
    "commit": "0123456789abcdef",
    "deployed": "x",
    "previous": None,
    "disk_free_mb": 123_456,
    "disk_total_mb": 500_000,
    "tailscale": "Running",
    "gpus": [
        {"index": 3, "memory_used": 71_680, "memory_total": 81_559, "use": 97, "pids": [11, 4711]}
    ],
}


def rendered(
    hosts: list[str],
    reports: dict[str, list[dict[str, Any]]],
    width: int = 80,
    expected: dict[str, list[str]] | None = None,
    **state: Any,
) -> tuple[str, bool]:
    states = dict.fromkeys(reports, STATE | state)
    units = {host: [one["unit"] for one in reports.get(host, ())] for host in hosts} | (
        expected or {}
    )
    table, notes, is_well = status_table(units, states, reports, NOW, width)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return "\n".join([capture.get(), *notes]), is_well


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_device_of_a_worker_is_shown_where_nvidia_smi_does_not_say(device: str) -> None:
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(device=device)]}, gpus=[])
    row = next(line for line in text.splitlines() if "gpu-1/0" in line)
    assert (device in row.split(), is_well) == (True, True)


def test_gpu_without_figures_of_its_own_is_shown_by_number() -> None:
    card = {"index": 0, "memory_used": None, "memory_total": None, "use": 12, "pids": [4711]}
    assert "0: 12%" in rendered(["gpu-1"], {"gpu-1": [report()]}, gpus=[card])[0]


def test_what_counts_is_readable_at_80_columns() -> None:
    text, is_well = rendered(["gpu-host-12"], {"gpu-host-12": [report()]})
    assert is_well
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in (
        "gpu-host-12/0",
        "0123456",
        "training-alone",
        "123456",
        "0.50",
        "64/99",
        "3: 97%",
        "123G",
    ):
        assert word in text, text


def test_fleet_without_gpus_and_tailnet_has_no_columns_for_them_and_room_for_others() -> None:
    text, _ = rendered(
        ["gpu-1"], {"gpu-1": [report(animal_name="tall owl")]}, gpus=[], tailscale=None
    )
    assert "gpu memory" not in text
    assert "tailscale" not in text
    assert "99990/100000" in text
    assert "tall owl" in text


def test_host_that_does_not_answer_is_in_the_table() -> None:
    text, is_well = rendered(["gpu-1", "gpu-2"], {"gpu-1": [report()]})
    assert not is_well
    assert "unreachable" in text


def test_host_without_anything_is_not_well() -> None:
    text, is_well = rendered(["gpu-1"], {"gpu-1": []}, commit=None)
    assert not is_well
    assert "not deployed" in text


def test_failed_and_silent_workers_are_not_well() -> None:
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(active="failed")]})
    assert not is_well
    assert "failed" in text
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(updated_at=NOW - 3600)]})
    assert not is_well
    assert "silent 60 min" in text


def test_more_is_shown_where_there_is_room() -> None:
    text, _ = rendered(["gpu-1"], {"gpu-1": [report()]}, width=160)
    for word in ("99990/100000", "70.0/80 GiB", "Running", "enormous translucent hippopotamus"):
        assert word in text, text


def test_clock_key_and_memory_of_a_host_are_named_with_what_to_do() -> None:
    wrong: dict[str, tuple[Any, str]] = {
        "clock_offset": (-3600.0, "clock: 3600 s behind this machine's; let NTP set both"),
        "key_expires_at": (time.time() + 2 * 86400, "the Tailscale key expires in 2 days"),
        "ill": (["ram: 120 of 64000 MB are available; end"], "ram: 120 of 64000 MB"),
    }
    for name, (value, said) in wrong.items():
        text, is_well = rendered(["gpu-1"], {"gpu-1": [report()]}, **{name: value})
        assert not is_well
        assert f"gpu-1: {said}" in text or f"gpu-1: tailscale: {said}" in text, text
    fine = {"clock_offset": 3.0, "key_expires_at": time.time() + 30 * 86400, "ill": []}
    assert rendered(["gpu-1"], {"gpu-1": [report()]}, **fine)[1]


def test_what_a_host_or_worker_complains_of_stands_below_the_table() -> None:
    text, is_well = rendered(
        ["gpu-1"],
        {"gpu-1": [report(last_error="port taken\x1b[2J")]},
        tailscale="NeedsLogin",
        disk_free_mb=12,
        deployed=None,
    )
    assert not is_well
    for words in (
        "gpu-1/0: port taken\\x1b[2J",
        "tailscale is NeedsLogin",
        "12 of 500000 MB free",
        "did not get to the end",
    ):
        assert words in text, text


def test_control_server_that_does_not_answer_is_named_and_no_login_is_advised() -> None:
    own = {"tailscale": "NoState", "tailscale_server": "https://headscale.example.org"}
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report()]}, **own)
    assert not is_well
    assert (
        "gpu-1: tailscale: its control server does not answer (https://headscale.example.org)"
        in text
    )
    assert "log it in again" not in text


def test_words_of_a_worker_do_nothing_to_the_terminal() -> None:
    said = {"state": "well\x1b[2J", "animal_name": "owl\x1b]0;x\x07"}
    text, _ = rendered(["gpu-1"], {"gpu-1": [report(**said)]}, width=200)
    assert "\x1b" not in text
    assert "well\\x1b[2J" in text


def test_json_and_table_agree_on_what_needs_a_look(capsys: pytest.CaptureFixture[str]) -> None:
    well = queries.Looked({"gpu-1": STATE}, {"gpu-1": [report(updated_at=time.time())]})
    ill = queries.Looked({"gpu-1": STATE}, {"gpu-1": [report(active="failed")]})
    assert [status._print_json({"gpu-1": [report()["unit"]]}, found) for found in (well, ill)] == [
        True,
        False,
    ]
    assert '"reason": null' in capsys.readouterr().out


def test_what_got_worse_is_named_and_needs_a_look_where_it_is_severe() -> None:
    def told(severity: str) -> dict[str, Any]:
        return {
            "warnings": [
                {
                    "check": "clock",
                    "severity": severity,
                    "text": "9 s behind\x1b[2J; let NTP set both",
                }
            ]
        }

    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(**told("warning"))]})
    assert is_well
    assert "gpu-1/0: clock: 9 s behind\\x1b[2J; let NTP set both" in text
    _, is_well = rendered(["gpu-1"], {"gpu-1": [report(**told("severe"))]})
    assert not is_well


def test_rewards_that_a_worker_holds_back_on_purpose_are_no_missing_credit() -> None:
    ledger = {"earned": 60, "sent": 0, "confirmed": 10, "rejected": 0}
    assert not rendered(["gpu-1"], {"gpu-1": [report(ledger=ledger)]})[1]
    assert rendered(["gpu-1"], {"gpu-1": [report(ledger={**ledger, "held-back": 50})]})[1]


def test_keeper_says_who_has_reported() -> None:
    keeper = {"state": "round-open", "round": 7, "reporters": 1, "expected": 2, "began_at": NOW}
    text, is_well = rendered(
        ["hub"],
        {
            "hub": [
                {"unit": "hivewright-keeper.service", "active_state": "active", "status": keeper}
            ]
        },
    )
    assert is_well
    assert "hub/keeper" in text
    assert "1/2" in text


def test_what_can_not_be_read_of_a_worker_or_its_gpus_is_not_well() -> None:
    damaged = report() | {"status": None, "problem": "status.json can't be read: no JSON"}
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(), damaged]})
    assert not is_well
    assert "unreadable" in text
    assert "gpu-1/0: status.json can't be read: no JSON" in text
    text, is_well = rendered(
        ["gpu-1"], {"gpu-1": [report()]}, gpus=[], problem="nvidia-smi: No devices were found"
    )
    assert not is_well
    assert "gpu-1: nvidia-smi: No devices were found" in text


HUB = list(COORDINATOR_UNITS)


def plain(unit: str, active: str = "active", **more: Any) -> dict[str, Any]:
    return {"unit": unit, "active_state": active, "status": None, **more}


def keeper(state: str = "round-open") -> dict[str, Any]:
    said = {"state": state, "round": 7, "reporters": 1, "expected": 2, "began_at": NOW}
    return plain("hivewright-keeper.service") | {"status": said}


def test_every_unit_that_the_inventory_names_is_a_line_and_one_that_stands_still_is_named() -> None:
    rest = [plain(unit) for unit in HUB if "keeper" not in unit]
    text, is_well = rendered(["hub"], {"hub": [*rest, keeper()]}, expected={"hub": HUB})
    assert is_well
    for unit in ("chain", "contract", "bootnode", "account", "dashboard"):
        assert f"hub/{unit}" in text
        stopped = [
            one | {"active_state": "inactive"} if unit in one["unit"] else one for one in rest
        ]
        text, is_well = rendered(["hub"], {"hub": [*stopped, keeper()]}, expected={"hub": HUB})
        assert not is_well
        line = next(line for line in text.splitlines() if line.startswith(f"hub/{unit}"))
        assert "inactive" in line
        gone = [one for one in rest if unit not in one["unit"]]
        text, is_well = rendered(["hub"], {"hub": [*gone, keeper()]}, expected={"hub": HUB})
        assert not is_well
        assert f"hub/{unit}: hivewright-{unit}.service is not there; deploy the host" in text


def test_keeper_without_a_chain_is_not_well() -> None:
    text, is_well = rendered(["hub"], {"hub": [keeper("chain-unreachable")]})
    assert not is_well
    assert "hub/keeper: it has no answer from the chain" in text


def test_keeper_whose_round_does_not_end_is_not_well_and_gives_its_last_error() -> None:
    stuck = keeper()
    stuck["status"] |= {"began_at": NOW - 2400, "limit_seconds": 600.0, "problem": "no gas\x1b[2J"}
    text, is_well = rendered(["hub"], {"hub": [stuck]})
    assert not is_well
    assert "hub/keeper: its round is open for 40 min, of at most 10 min: no round ends" in text
    assert "its last error: no gas\\x1b[2J; see that the chain runs" in text
    for well in ({"began_at": NOW - 1200}, {"limit_seconds": None}, {"state": "waiting-for-peers"}):
        told = stuck | {"status": stuck["status"] | well}
        assert rendered(["hub"], {"hub": [told]})[1], well


def test_service_that_the_kernel_ended_for_its_memory_says_so() -> None:
    ended = report(active="activating") | {"result": "oom-kill", "exit_status": 9}
    text, is_well = rendered(["gpu-1"], {"gpu-1": [ended]})
    assert not is_well
    assert "gpu-1/0: the kernel ended it because its memory was used up" in text
    assert "kernel" not in rendered(["gpu-1"], {"gpu-1": [report() | {"result": "success"}]})[0]


def test_worker_whose_rewards_do_not_come_to_the_chain_is_not_well() -> None:
    ledger = {"earned": 60, "sent": 50, "confirmed": 48, "rejected": 1}
    text, is_well = rendered(
        ["gpu-1"], {"gpu-1": [report(ledger=ledger, ledger_error="nonce too low")]}
    )
    assert not is_well
    assert (
        "gpu-1/0: not credited: 11 rewards wait for the chain, 48 are confirmed: nonce too low"
        in text
    )
    assert rendered(["gpu-1"], {"gpu-1": [report(ledger=ledger | {"confirmed": 57})]})[1]
    few = ledger | {"confirmed": 57}
    text, is_well = rendered(["gpu-1"], {"gpu-1": [report(ledger=few, chain="unreachable")]})
    assert not is_well
    assert "2 rewards wait, the chain can't be reached" in text


def test_unfinished_deploy_and_a_tailnet_that_is_left_are_not_well() -> None:
    for state in ({"deployed": None}, {"tailscale": "NeedsLogin"}):
        assert not rendered(["gpu-1"], {"gpu-1": [report()]}, **state)[1]


def test_service_that_the_inventory_does_not_name_is_named() -> None:
    text, is_well = rendered(["hub"], {"hub": [keeper(), report()]}, expected={"hub": HUB[3:4]})
    assert not is_well
    assert "hub/0: the inventory does not name it; the next deploy stops it" in text


def test_last_words_of_a_service_that_has_ended_are_shown() -> None:
    ended = report(active="failed") | {"last_words": "RuntimeError: boom"}
    text, is_well = rendered(["gpu-1"], {"gpu-1": [ended]})
    assert not is_well
    assert "gpu-1/0: before its last end it said: RuntimeError: boom" in text


def test_what_the_inventory_says_should_run() -> None:
    hosts = [
        {"name": "hub", "groups": ["coordinators"], "data": {}},
        {"name": "plain", "groups": ["coordinators"], "data": {"market_enabled": False}},
        {"name": "two", "groups": ["workers"], "data": {"slots": [{}, {"gpu": 1}]}},
        {"name": "auto", "groups": ["workers"], "data": {"slots": "auto"}},
        {"name": "wrong", "groups": ["workers"], "data": {"slots": -1}},
    ]
    worker = "hivewright-worker@{}.service"
    assert status.expected(hosts) == {
        "hub": HUB,
        "plain": [unit for unit in HUB if unit != "hivewright-judge.service"],
        "two": [worker.format(0), worker.format(1)],
        "auto": [status.AUTO_SLOTS],
        "wrong": [worker.format(0)],
    }
    auto = status.expected(hosts[3:4])
    text, is_well = rendered(
        ["auto"], {"auto": [report(), report(worker.format(1))]}, expected=auto
    )
    assert is_well
    assert "auto/1" in text
    assert not rendered(["auto"], {"auto": []}, expected=auto)[1]

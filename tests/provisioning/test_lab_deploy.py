"""deploy.py on real hosts: h1 is the coordinator, h2 and h3 train, h4 deploys itself.

The tests run in this order on one fleet; each leaves it training.
"""

import base64
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploys.services import COORDINATOR_UNITS
from lab.lab import REPOSITORY_URL, Lab
from lab.lab_host import CHECKOUT, Host
from lab.process import wait_until
from worker.swarm import identity

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]

INVENTORY = "inventory/lab.py"
BET = {"confirmed", "claiming", "paid", "lost"}
"""States of bets that are on the chain."""
DEPLOY_SECONDS = 600
WORKER = "hivewright-worker@0.service"
SERVICES = list(COORDINATOR_UNITS)


def pyinfra(
    lab: Lab, *arguments: str, inventory: str | Path = INVENTORY
) -> subprocess.CompletedProcess[str]:
    return lab.operator(
        "pyinfra", "-y", inventory, "deploy.py", *arguments, timeout=DEPLOY_SECONDS, check=False
    )


def state_file(host: Host, name: str) -> Path:
    """Return a file of the host's worker, readable without the host's network."""
    return host.root / "var/lib/hivewright/worker-0" / name


def status(host: Host) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(state_file(host, "status.json").read_text())
    return read


def rounds(host: Host) -> list[int]:
    """Return the rounds that the host has trained, without their further parts."""
    lines = map(json.loads, state_file(host, "rounds.jsonl").read_text().splitlines())
    return [line["round"] for line in lines if line["part"] == 0]


def is_sharing(host: Host) -> bool:
    """Return whether the host's last part was trained with its only peer's groups."""
    now = status(host)
    return (now["state"], now["peers_heard"]) == ("connected", 1) and now["groups_external"] > 0


def main_pid(host: Host, unit: str) -> int:
    return int(host.ssh(f"systemctl show --property=MainPID --value {unit}").stdout)


def wait_for_rounds(*hosts: Host, more: int = 2, timeout: float = 90) -> None:
    """Wait until every host has finished this many more rounds."""
    before = {host.name: len(rounds(host)) for host in hosts}
    for host in hosts:
        wait_until(
            lambda h=host: len(rounds(h)) >= before[h.name] + more,
            timeout,
            f"{host.name} trains {more} rounds",
            0.5,
        )


def test_deployed_workers_train_together_and_are_paid(fleet: Lab) -> None:
    h2, h3 = fleet.host(2), fleet.host(3)
    for host in (h2, h3):
        wait_until(
            lambda h=host: state_file(h, "rounds.jsonl").exists(),
            90,
            f"{host.name} trains a first round",
        )
    wait_for_rounds(h2, h3, more=3)
    for host in (h2, h3):
        wait_until(
            lambda h=host: status(h)["ledger"].get("confirmed", 0) >= 2,
            60,
            f"{host.name}'s rewards are on the chain",
        )
        # A further part may be trained before the peer has new groups.
        wait_until(lambda h=host: is_sharing(h), 60, f"{host.name} trains with its peer", 0.1)
    assert status(h2)["peer_id"] != status(h3)["peer_id"]


def test_services_run_under_systemd_and_nothing_has_failed(fleet: Lab) -> None:
    units = {1: SERVICES, 2: [WORKER], 3: [WORKER]}
    for number, names in units.items():
        for name in names:
            shown = (
                fleet.host(number)
                .ssh(f"systemctl show --property=ActiveState,UnitFileState,NRestarts {name}")
                .stdout
            )
            assert sorted(shown.split()) == [
                "ActiveState=active",
                "NRestarts=0",
                "UnitFileState=enabled",
            ], name
        assert fleet.host(number).ssh("systemctl is-system-running").stdout.strip() == "running"
    for unit, number in ((WORKER, 2), *((service, 1) for service in SERVICES)):
        exposure = (
            fleet.host(number).ssh(f"systemd-analyze security --no-pager {unit} | tail -n 1").stdout
        )
        assert float(exposure.split(": ")[1].split()[0]) <= 2.0, exposure


def test_dashboard_shows_the_swarm_and_sees_no_key_of_its_neighbours(fleet: Lab) -> None:
    hub = fleet.host(1)
    ask = (
        "from urllib.request import urlopen;"
        " print(urlopen('http://127.0.0.1:3001/api/swarm').read().decode())"
    )

    def said() -> dict[str, Any]:
        return dict(json.loads(hub.ssh(f'python3 -c "{ask}"').stdout))

    wait_until(lambda: len(said()["rounds"]) > 1, 90, "the dashboard shows rounds", 0.5)
    assert (said()["error"], said()["num_peers"]) == (None, 2)
    pid = main_pid(hub, "hivewright-dashboard.service")
    found = hub.ssh(
        f"cd /proc/{pid}/root/var/lib/hivewright && find . -mindepth 2 -maxdepth 2 | sort"
    ).stdout.split()
    # The chain's folder has its socket only.
    shown = [
        "./chain/rpc",
        "./dashboard/address",
        "./dashboard/history.db",
        "./dashboard/history.db-shm",
        "./dashboard/history.db-wal",
        "./dashboard/lock",
        "./dashboard/owner.token",
        "./keeper/audit",
        "./keeper/deployment.json",
        "./prometheus/targets.json",
    ]
    assert found == shown
    assert hub.ssh(f"ls /proc/{pid}/root/var/lib/hivewright/chain/rpc").stdout.split() == [
        "chain.sock"
    ]


def test_worker_compiles_its_native_operations_within_its_sealed_unit_and_says_so(
    fleet: Lab,
) -> None:
    for number in (2, 3):
        said = (
            fleet.host(number)
            .ssh(f"journalctl --no-pager --unit={WORKER} | grep 'generation engine='")
            .stdout
        )
        assert "engine=torch, lean decoder with native operations" in said


def test_secrets_are_only_where_they_belong(fleet: Lab) -> None:
    token = (fleet.folder / "secrets/enrolment.token").read_text().strip()
    for number in (1, 2, 3):
        host = fleet.host(number)
        shown = host.ssh("stat --format='%a %U' /etc/hivewright/enrolment.token").stdout.strip()
        assert shown == "600 root"
        found = host.ssh(
            f"journalctl --no-pager | grep --count {token}; ps -ef | grep -v grep | grep --count"
            f" {token}; true"
        )
        assert found.stdout.split() == ["0", "0"]
        files = host.ssh(
            f"grep --recursive --files-with-matches {token} /etc /var /opt/hivewright/current /tmp"
            " || true"
        )
        assert files.stdout.split() == ["/etc/hivewright/enrolment.token"]
    private = fleet.host(2).ssh(
        "stat --format=%a /var/lib/hivewright/worker-0/swarm.pem /var/lib/hivewright/worker-0"
    )
    assert private.stdout.split() == ["600", "700"]


def test_second_deploy_changes_nothing_and_asks_each_host_twice(fleet: Lab) -> None:
    pids = [main_pid(fleet.host(2), WORKER), main_pid(fleet.host(1), "hivewright-chain.service")]
    done = pyinfra(fleet, "--json", "--debug")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)["results"]
    changed = [
        operation["name"]
        for operation in results["operations"]
        if operation["success"] or operation["error"]
    ]
    assert changed == []
    assert results["totals"]["no_change"] == results["totals"]["hosts"] > 50
    assert results["failed_hosts"] == []
    assert pids == [
        main_pid(fleet.host(2), WORKER),
        main_pid(fleet.host(1), "hivewright-chain.service"),
    ]
    for name in ("h1", "h2", "h3"):
        assert 0 < done.stderr.count(f"Running command on {name}: ") <= 2


def test_dry_run_sees_no_change_either(fleet: Lab) -> None:
    done = fleet.operator(
        "pyinfra", "--dry", "--json", INVENTORY, "deploy.py", timeout=DEPLOY_SECONDS
    )
    plan = json.loads(done.stdout)["plan"]
    assert len(plan) > 30
    assert [operation["name"] for operation in plan if operation["hosts_with_change"]] == []


def test_command_on_the_host_shows_what_its_worker_does(fleet: Lab) -> None:
    shown = (
        fleet.host(2)
        .ssh("hivewright status --settings /etc/hivewright/worker-0.yaml --json")
        .stdout
    )
    assert json.loads(shown)["peer_id"] == status(fleet.host(2))["peer_id"]


def test_fleet_status_shows_every_worker(fleet: Lab) -> None:
    command = ("python", "-m", "worker", "fleet", "status", INVENTORY)
    lines: list[str] = []

    def both_are_connected() -> bool:
        lines[:] = fleet.operator(*command, timeout=60).stdout.splitlines()
        rows = {line.split()[0]: line for line in lines}
        assert "h1/keeper" in rows
        return all("connected" in rows[name] for name in ("h2/0", "h3/0"))

    # On a busy machine a round's groups of the peer may come too late.
    wait_until(both_are_connected, 120, "h2 and h3 are connected in the same table")
    assert max(map(len, lines)) <= 80


def test_workers_bet_on_the_questions_of_the_deployed_judge(fleet: Lab) -> None:
    for number in (2, 3):
        host = fleet.host(number)
        wait_until(
            lambda h=host: BET & status(h)["market"].keys(),
            300,
            f"{host.name} has a bet in a game",
        )
    record = fleet.host(2).ssh("cat /var/log/hivewright/worker-0/prg_record.txt").stdout
    assert "placed bet of" in record


@pytest.mark.nightly  # test_fleet_harvest.py runs the same commands without real hosts
def test_best_model_of_the_fleet_comes_home(fleet: Lab, tmp_path: Path) -> None:
    """Its weights are those of a checkpoint of the fleet, or their average."""
    wait_for_rounds(fleet.host(2), fleet.host(3), more=1)
    output = tmp_path / "model"
    done = fleet.operator(
        "hivewright", "fleet", "harvest", INVENTORY, "--limit", "workers", "--tasks", "4",
        "--seconds", "60", "--output", output, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("h2/0", "h3/0"):
        assert f"{name}: held-out reward" in done.stdout
    assert "## Harvest" in (output / "README.md").read_text()
    AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for host in (fleet.host(2), fleet.host(3)):
        assert not host.ssh("ls -d /var/tmp/hivewright-harvest-*", check=False).stdout
        assert not list((host.root / "var/lib/hivewright/worker-0").glob(".harvest-*"))


def test_killed_worker_trains_again_within_a_minute_as_itself(fleet: Lab) -> None:
    host = fleet.host(2)
    peer_id, key = status(host)["peer_id"], state_file(host, "swarm.pem").read_bytes()
    started = time.monotonic()
    host.ssh(f"kill -9 {main_pid(host, WORKER)}")
    wait_for_rounds(host, more=1, timeout=60)
    assert time.monotonic() - started < 60
    assert status(host)["peer_id"] == peer_id
    assert state_file(host, "swarm.pem").read_bytes() == key
    trained = rounds(host)
    assert len(trained) == len(set(trained)), trained
    ledger = json.loads(
        host.ssh("hivewright ledger --settings /etc/hivewright/worker-0.yaml --json").stdout
    )
    in_ledger = [row["round"] for row in ledger]
    assert len(in_ledger) == len(set(in_ledger)), in_ledger


def test_host_without_network_goes_on_alone_and_rejoins(fleet: Lab) -> None:
    host = fleet.host(3)
    fleet.host(3).cut()
    try:
        wait_until(
            lambda: status(host)["state"] == "training-alone",
            120,
            "h3 says that it trains alone",
            0.5,
        )
        before = status(host)["practice_steps"]
        wait_until(
            lambda: status(host)["practice_steps"] > before, 60, "h3 goes on training alone", 0.5
        )
    finally:
        host.heal()
    wait_until(lambda: status(host)["state"] == "connected", 120, "h3 is connected again", 0.5)
    wait_for_rounds(host, fleet.host(2))
    wait_until(lambda: status(host)["peers_heard"] == 1, 60, "h3 hears its peer again", 0.5)
    assert len(rounds(host)) == len(set(rounds(host)))


def test_unreachable_host_is_named_in_the_last_line_and_the_others_are_done(fleet: Lab) -> None:
    fleet.host(3).cut()
    try:
        done = pyinfra(fleet)
    finally:
        fleet.host(3).heal()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("failed: h3 (can't be reached); "), last
    total = next(line.split() for line in done.stderr.splitlines() if "Grand total" in line)
    assert total[3] == "-", total  # no operation changed anything
    assert total[4] == "-", total  # none failed
    wait_for_rounds(fleet.host(3), fleet.host(2), timeout=180)


def test_host_that_vanishes_in_the_middle_does_not_hold_the_others(fleet: Lab) -> None:
    # There must be something to do on it: a host that is as it should be is asked at the beginning
    # only.
    fleet.host(3).ssh("rm /var/lib/hivewright/deployed/host")
    program = fleet.network.inside(sys.executable, "-m", "pyinfra", "-y", INVENTORY, "deploy.py")
    with subprocess.Popen(
        program, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        try:
            for line in run.stderr:
                if "Starting operation: Release" in line:
                    fleet.host(3).cut()
                    break
            rest = run.communicate(timeout=200)[1]
        finally:
            run.kill()
            fleet.host(3).heal()
    assert run.returncode == 1
    assert rest.strip().splitlines()[-1].startswith("failed: h3 ("), rest[-2000:]
    operations = rest.split("--> Results:")[0].split("Starting operation: ")
    last = next(text for text in operations if text.startswith("Remove releases"))
    assert "[h1] No changes" in last
    assert "[h2] No changes" in last
    wait_for_rounds(fleet.host(3), fleet.host(2), timeout=180)


def test_copied_identity_is_refused_before_anything_is_touched(fleet: Lab) -> None:
    original, copy = fleet.host(2), fleet.host(3)
    folder = "/var/lib/hivewright/worker-0"
    enrolment = state_file(original, "enrolment.json").read_text().replace("\n", "")
    copy.ssh(f"cp {folder}/enrolment.json /root/ && echo '{enrolment}' > {folder}/enrolment.json")
    try:
        done = pyinfra(fleet)
    finally:
        copy.ssh(f"cp /root/enrolment.json {folder}/enrolment.json")
    assert done.returncode == 1
    peer_id = status(original)["peer_id"]
    assert "slot 0 of h2" in done.stderr
    assert f"have one identity, {peer_id}; two workers can't be one node" in done.stderr
    assert "Starting operation" not in done.stderr


def test_changed_setting_restarts_only_who_reads_it(fleet: Lab) -> None:
    keeper, account = (f"hivewright-{name}.service" for name in ("keeper", "account"))
    hub = fleet.host(1)
    before = [main_pid(hub, keeper), main_pid(hub, account)], main_pid(fleet.host(2), WORKER)
    done = pyinfra(
        fleet, "--data", "trainer_learning_rate=0.000123", "--limit", "h1", "--limit", "h2"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [main_pid(hub, keeper), main_pid(hub, account)] == before[0]
    assert main_pid(fleet.host(2), WORKER) != before[1]
    assert (
        "learning_rate: 0.000123" in fleet.host(2).ssh("cat /etc/hivewright/worker-0.yaml").stdout
    )


def test_settings_that_only_the_release_can_refuse_change_nothing(fleet: Lab) -> None:
    host = fleet.host(3)
    file = host.root / "etc/hivewright/worker-0.yaml"
    before = main_pid(host, WORKER), file.read_text()
    done = pyinfra(
        fleet, "--data", 'environment_families=[{"name": "no_such_family"}]', "--limit", "h3"
    )
    assert done.returncode == 1
    assert "hivewright check: SettingsError (exit 2): " in done.stderr
    assert "no_such_family" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "failed: h3 (Release | Check the settings with it); fix these"
    )
    assert (main_pid(host, WORKER), file.read_text()) == before
    assert [path.name for path in file.parent.glob("*.new")] == []


def test_host_that_lost_power_comes_back_by_itself(fleet: Lab) -> None:
    host = fleet.host(2)
    trained = rounds(host)
    host.pull_plug()
    fleet.start(2)
    wait_for_rounds(host, more=1, timeout=120)
    assert rounds(host)[: len(trained)] == trained
    assert len(rounds(host)) == len(set(rounds(host)))


def test_slot_moves_in_with_its_key_and_leaves_its_identity_behind(
    fleet: Lab, tmp_path: Path
) -> None:
    moved = identity.create(tmp_path / "swarm.pem")
    one_slot = '("h3", {"ssh_hostname": "10.88.0.13", "slots": 1})'
    two_slots = one_slot.replace("1})", f"[{{}}, {{'identity': '{tmp_path}/swarm.pem'}}]}})")
    text = (CHECKOUT / INVENTORY).read_text()
    assert one_slot in text
    (tmp_path / "two_slots.py").write_text(text.replace(one_slot, two_slots))
    host, second = fleet.host(3), "hivewright-worker@1.service"
    first_pid = main_pid(host, WORKER)
    try:
        done = pyinfra(fleet, "--limit", "h3", inventory=tmp_path / "two_slots.py")
        assert done.returncode == 0, done.stderr[-3000:]
        enrolment = json.loads(host.ssh("cat /var/lib/hivewright/worker-1/enrolment.json").stdout)
        assert enrolment["peer_id"] == moved.peer_id
        assert host.ssh(f"systemctl is-active {second}").stdout.strip() == "active"
    finally:
        done = pyinfra(fleet, "--limit", "h3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert host.ssh(f"systemctl is-active {second}", check=False).stdout.strip() == "inactive"
    assert host.ssh("ls /etc/hivewright").stdout.split() == ["enrolment.token", "worker-0.yaml"]
    assert host.ssh("ls -d /var/lib/hivewright/worker-*").stdout.split() == [
        "/var/lib/hivewright/worker-0"
    ]
    key = host.ssh("cat /var/lib/hivewright/retired/worker-1-*/swarm.pem | base64").stdout
    assert main_pid(host, WORKER) == first_pid
    assert base64.b64decode(key) == (tmp_path / "swarm.pem").read_bytes()


OWNER = """from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPErrorProcessor, Request, build_opener
class NoFollowing(HTTPErrorProcessor):
    def http_response(self, request, response):
        return response
opener = build_opener(NoFollowing)
token = Path("/var/lib/hivewright/dashboard/owner.token").read_text().strip()
own = "http://127.0.0.1:3001"
form = urlencode({"token": token}).encode()
cookie = opener.open(Request(own + "/owner", form, {"Origin": own})).headers["Set-Cookie"]
page = Request(own + "/answers", headers={"Cookie": cookie.partition(";")[0]})
print(opener.open(own + "/answers").status)
print(opener.open(page).read().decode())
"""


def expect_answers_for_the_owner(host: Host) -> None:
    """Wait until the dashboard shows the worker's answers to its owner, through the walls."""
    pid = main_pid(host, "hivewright-dashboard.service")
    state = f"/proc/{pid}/root/var/lib/hivewright"
    assert host.ssh(f"ls -A {state}/worker-0").stdout.split() == ["answers"]
    written = host.ssh(f"touch {state}/worker-0/answers/x", check=False)
    assert "Read-only" in written.stderr
    others = host.ssh("runuser -u hivewright -- ls /run/hivewright-answers", check=False)
    assert "Permission denied" in others.stderr
    (host.root / "opt/owner.py").write_text(OWNER)

    def shown() -> str:
        return host.ssh("python3 /opt/owner.py").stdout

    wait_until(lambda: "its own, mean reward" in shown(), 120, "the owner sees answers", 1.0)
    assert shown().startswith("403\n")
    # Also after a restart, and no mount is left behind when it is stopped.
    host.ssh("systemctl restart hivewright-dashboard")
    wait_until(lambda: "its own, mean reward" in shown(), 60, "they are there again", 1.0)
    host.ssh("systemctl stop hivewright-dashboard")
    assert "hivewright-answers" not in host.ssh("cat /proc/mounts").stdout
    host.ssh("systemctl start hivewright-dashboard")


@pytest.mark.nightly
def test_machine_deploys_itself(fleet: Lab) -> None:
    """inventory/local.py, from a user's checkout, with the environment that the deploy installs."""
    host = fleet.host(4)
    host.ssh(
        "apt-get -qq update && apt-get -qq -y --no-install-recommends install git", timeout=120
    )
    host.ssh(
        f"useradd -m alice && su alice -c 'git clone -q -b lab {REPOSITORY_URL}"
        " /home/alice/hivewright'",
        timeout=60,
    )
    # It may have been a host of the fleet, whose enrolment token a deploy of another owner does not
    # replace.
    host.ssh("rm -f /etc/hivewright/enrolment.token")
    pyinfra_there = "/opt/hivewright/environments/*/bin/pyinfra"
    run = (
        f"cd /home/alice/hivewright && {pyinfra_there} -y inventory/local.py deploy.py --data"
        " torch_index=pip 2>&1"
    )
    first = host.ssh(run, timeout=DEPLOY_SECONDS, check=False)
    assert first.returncode == 0, first.stdout[-5000:]
    assert host.ssh(f"systemctl is-active {' '.join([WORKER, *SERVICES])}").stdout.split() == [
        "active"
    ] * len([WORKER, *SERVICES])
    expect_answers_for_the_owner(host)
    again = host.ssh(run, timeout=DEPLOY_SECONDS)
    total = next(line.split() for line in again.stdout.splitlines() if "Grand total" in line)
    assert total[3:5] == ["-", "-"], total

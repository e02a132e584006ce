"""The whole deploy.py with pyinfra's command line, on hosts of its @fake connector."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hosts import CHECKOUT, COMMIT, FAKE_ANSWERS, PYINFRA, pyinfra

from deploys import mesh, operator, units
from deploys.facts import ChosenModels, ConfiguredServices, ConfiguredSlots, Identities, MovedAway
from deploys.fleet.pyinfra_process import Pyinfra
from deploys.inventory import planning, validation
from deploys.inventory.host_plan import HostEntry, Planned
from tests import preloaded
from worker.errors import SettingsError
from worker.swarm import identity


def test_everything_of_the_coordinator_comes_before_anything_of_a_worker(
    write_inventory: Any,
) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 2}, {"slots": 1})
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 0, done.stderr
    names = [operation["name"] for operation in json.loads(done.stdout)["results"]["operations"]]
    barrier = names.index("Account | Wait until it answers")
    assert (
        max(number for number, name in enumerate(names) if name.startswith("Coordinator")) < barrier
    )
    assert min(number for number, name in enumerate(names) if name.startswith("Worker")) > barrier
    assert names.index("Coordinator | Run the chain") < names.index(
        "Coordinator | Run the contract"
    )
    assert names.index("Worker | Enrol slot 1") > names.index("Worker | Run slot 0")


def test_settings_that_the_release_refuses_stop_that_host_before_anything_is_switched(
    write_inventory: Any,
) -> None:
    """Some settings only the release can check, such as task families."""
    line = "hivewright check: SettingsError (exit 2): environment_families: no such family"
    refused = {
        "worker check --settings /etc/hivewright/worker-1.yaml.new": {
            "success": False,
            "stderr": line,
        }
    }
    answers = FAKE_ANSWERS | refused
    inventory = write_inventory(
        {"account_host": "192.0.2.10"}, {"slots": 2, "fake_responses": answers}, {"slots": 2}
    )
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 1
    assert line in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "failed: @fake/gpu-0 (Release | Check the settings with it); fix"
    )
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    assert outcomes["Release | Check the settings with it"]["error"] == ["@fake/gpu-0"]
    assert outcomes["Release | Make it the current release"]["success"] == [
        "@fake/gpu-1",
        "@fake/hub",
    ]
    assert outcomes["Worker | Write worker-0.yaml"]["success"] == ["@fake/gpu-1"]
    assert outcomes["Worker | Run slot 0"]["success"] == ["@fake/gpu-1"]


@pytest.mark.parametrize(("setting", "is_kept"), [("", True), ("1", False)])
def test_bytecode_of_the_operators_modules_is_kept_unless_python_is_told_not_to(
    tmp_path: Path, setting: str, is_kept: bool
) -> None:
    """Pyinfra turns it off for all modules, and compiling them takes a tenth of an idle deploy."""
    own = {"PYTHONDONTWRITEBYTECODE": setting, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    # Python reads these when it starts, so tests/preloaded.py can't start this one.
    done = subprocess.run(
        [sys.executable, "-m", "pyinfra", "-y", tmp_path / "missing.py", "deploy.py"],
        cwd=CHECKOUT,
        env={**os.environ, **own},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    folder = tmp_path.joinpath(*CHECKOUT.parts[1:], "deploys", "inventory")
    assert any(folder.glob("loading.*.pyc")) == is_kept


def test_host_without_systemd_is_refused_before_anything_is_installed(write_inventory: Any) -> None:
    answers = FAKE_ANSWERS | {
        "/run/systemd/system": "systemd sh\nkernel 6.8.0\ncontainer docker",
        "@fake/gpu-0: systemd does not run there": {"success": False, "stderr": "refused"},
    }
    inventory = write_inventory(
        {"account_host": "192.0.2.10"}, {"slots": 1, "fake_responses": answers}, {"slots": 1}
    )
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 1
    failed = "failed: @fake/gpu-0 (Check that it can be what the inventory says)"
    assert done.stderr.splitlines()[-1].startswith(failed)
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    assert outcomes["System | Install packages"]["success"] == ["@fake/gpu-1", "@fake/hub"]


def test_coordinator_on_arm_is_refused_before_anything_is_done_unless_it_brings_its_anvil(
    write_inventory: Any,
) -> None:
    answers = FAKE_ANSWERS | {
        "VERSION_CODENAME": "debian,trixie,aarch64",
        "is for x86_64, and this host is aarch64: make another host": {
            "success": False,
            "stderr": "refused",
        },
    }
    refused = write_inventory(
        {"account_host": "192.0.2.10", "fake_responses": answers}, {"slots": 1}
    )
    done = pyinfra("-y", "--json", refused, "deploy.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "failed: @fake/hub (Check that it can be what the inventory says)"
    )
    own = {
        "account_host": "192.0.2.10",
        "fake_responses": answers,
        "anvil_binary": "/usr/local/bin/anvil",
    }
    done = pyinfra("-y", "--json", write_inventory(own, {"slots": 1}), "deploy.py")
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = {one["name"] for one in json.loads(done.stdout)["results"]["operations"]}
    assert "Release | Install its anvil" not in outcomes


def test_host_whose_gpus_do_not_go_with_its_slots_fails_before_anything_is_done_there(
    write_inventory: Any,
) -> None:
    """The message contains host and reason; other hosts are deployed."""
    answers = FAKE_ANSWERS | {
        "nvidia-smi --query-gpu": "gpu 0, GPU-a, Card, 24564, 14.0, 600.1\ncuda 14.0",
        "Card (compute capability 14.0) is newer than every build of torch": {
            "success": False,
            "stderr": "refused",
        },
    }
    inventory = write_inventory(
        {"account_host": "192.0.2.10"},
        {"slots": "auto", "fake_responses": answers},
        {"slots": "auto"},
    )
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "failed: @fake/gpu-0 (Check that it can be what the inventory says); fix"
    )
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    assert outcomes["Check that it can be what the inventory says"]["error"] == ["@fake/gpu-0"]
    assert outcomes["System | Install packages"]["success"] == ["@fake/gpu-1", "@fake/hub"]


def test_token_is_in_no_output(write_inventory: Any, tmp_path: Path) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 1})
    done = pyinfra("-y", "-vvv", "--debug", "--diff", inventory, "deploy.py")
    assert done.returncode == 0, done.stderr
    token = (tmp_path / "secrets/enrolment.token").read_text().strip()
    assert "Write the enrolment token" in done.stderr
    said = done.stdout + done.stderr
    assert token not in said
    assert base64.b64encode(f"{token}\n".encode()).decode() not in said


def test_deploys_of_a_rollout_take_plans_that_were_checked_once(
    write_inventory: Any, tmp_path: Path
) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 2}, {"slots": 1})
    operator.keep_token(tmp_path / "secrets", "SECRET-TOKEN")
    plans, log = tmp_path / "plans", tmp_path / "log"
    fleet = Pyinfra(str(inventory), plans=plans)
    assert len(fleet.hosts(timeout=60, is_to_be_deployed=True)) == 3
    assert "SECRET-TOKEN" not in "".join(file.read_text() for file in plans.iterdir())
    # By now another host's data are wrong: a run with checked plans does not look at them.
    inventory.write_text(
        inventory.read_text().replace("{'fake_delay'", "{'no_such_key': 1, 'fake_delay'", 1)
    )
    with pytest.raises(SettingsError, match="no_such_key: not a known key"):
        Pyinfra(str(inventory)).deploy("@fake/gpu-0", None, log, timeout=60)
    other = "b" * 40
    ran = fleet.deploy("@fake/gpu-0", other, log, timeout=60)
    assert (ran.outcome, ran.reason) == ("done", "")
    assert f"Check out {other[:12]}" in log.read_text()
    assert "Run slot 1" in log.read_text()


def test_plan_reads_back_as_it_was_handed_on() -> None:
    data = {
        "slots": [{"gpu": "1:0", "node_name": "x"}, {"model_device": "cpu"}],
        "slot_memory_gb": 10,
        "slot_cpus": 3.5,
        "tailscale": True,
        "tailscale_serve": {443: 3000},
        "trainer_learning_rate": 1e-5,
        "environment_families": [{"name": "basic_arithmetic", "config": {"min_terms": 2}}],
    }
    hub = HostEntry("hub", ("coordinators",), {"account_host": "192.0.2.10", "wireguard": True})
    auto = HostEntry("auto", ("workers",), {"slots": "auto", "wireguard": True})
    entries = [hub, HostEntry("two", ("workers",), data), auto]
    plans = validation.check(entries)
    members = mesh.members(
        {name: plan.deployment for name, plan in plans.items()}, {e.name: e.data for e in entries}
    )
    assert set(members) == {"hub", "auto"}
    for plan in plans.values():
        planned = Planned(plan, "https://git.example.org/h.git", COMMIT, None, members)
        again = planning._AS_JSON.validate_json(planning._AS_JSON.dump_json(planned))
        assert again == planned
        texts = [
            [units.settings_text(of) for of in each.host.settings_files().values()]
            for each in (planned, again)
        ]
        assert texts[0] == texts[1]


def test_what_will_probably_not_work_is_warned_of_before_a_deploy_and_by_a_rollout(
    write_inventory: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {
        "tailscale": True,
        "tailscale_login_server": "https://hs.example.org",
        "tailscale_serve": {443: 3000},
    }
    inventory = write_inventory({"account_host": "192.0.2.10", **own}, {"slots": 1})
    expected = (
        "warning: inventory data of @fake/hub: tailscale_serve: needs HTTPS certificates, which "
    )
    # Ends before it connects, for want of a terminal.
    done = pyinfra(inventory, "deploy.py")
    warned, refused = done.stderr.splitlines()[-2:]
    assert warned.startswith(expected)
    assert refused.startswith("no terminal to confirm the changes at")
    Pyinfra.of_operator(str(inventory)).hosts(timeout=60, is_to_be_deployed=True)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(expected)


def test_dry_run_without_terminal_shows_the_changes_of_the_hosts_that_can_be_reached(
    tmp_path: Path,
) -> None:
    common = {
        "release_repository": "h.git",
        "release_ref": COMMIT,
        "secrets_dir": str(tmp_path / "secrets"),
    }
    gone = common | {"ssh_port": 1, "slots": 1}
    inventory = tmp_path / "fleet.py"
    hub = common | {"account_host": "192.0.2.10", "fake_responses": FAKE_ANSWERS}
    inventory.write_text(
        f"coordinators = [('@fake/hub', {hub!r})]\nworkers = [('127.0.0.1', {gone!r})]\n"
    )
    done = pyinfra("--dry", inventory, "deploy.py")
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "Release | Make it the current release 1 (@fake/hub)" in said
    assert "EOFError" not in said
    assert not (tmp_path / "secrets").exists()
    assert said.endswith(
        "failed: 127.0.0.1 (can't be reached); fix these hosts and run again (hosts that succeeded"
        " are left unchanged)"
    )


def test_two_workers_with_one_identity_stop_the_run_with_the_reason_last(
    write_inventory: Any,
) -> None:
    """Also when another host fails: nothing is done anywhere, and that host is not blamed."""
    enrolled = "/var/lib/hivewright/worker-0/enrolment.json " + json.dumps({"peer_id": "Qm1"})
    answer = FAKE_ANSWERS | {Identities().command(): enrolled}
    same = {"slots": 1, "fake_responses": answer}
    done = pyinfra("-y", write_inventory({"account_host": "192.0.2.10"}, same, same), "deploy.py")
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("nothing was done on any host: slot 0 of @fake/gpu-")
    assert (
        "have one identity, Qm1; two workers can't be one node: stop one, and remove swarm.pem"
        in last
    )


def test_damaged_enrolment_is_the_trouble_of_its_host_alone(write_inventory: Any) -> None:
    file = "/var/lib/hivewright/worker-0/enrolment.json"
    refused = {
        f"{file}: damaged; expected the JSON that enrolment wrote": {
            "success": False,
            "stderr": "refused",
        }
    }
    ill = FAKE_ANSWERS | {Identities().command(): f'{file} {{"peer_id": "Qm'} | refused
    backed_up = FAKE_ANSWERS | {
        Identities().command(): '/var/lib/hivewright/worker-0.bak/enrolment.json {"peer_id": "Q"}'
    }
    hosts = ({"slots": 1, "fake_responses": answers} for answers in (ill, backed_up))
    done = pyinfra(
        "-y", "--json", write_inventory({"account_host": "192.0.2.10"}, *hosts), "deploy.py"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "failed: @fake/gpu-0 (Check that it can be what the inventory says)"
    )
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    assert outcomes["Worker | Enrol slot 0"]["success"] == ["@fake/gpu-1"]


def test_slot_whose_key_was_set_aside_by_a_move_is_refused_with_both_ways_out(
    write_inventory: Any,
) -> None:
    """Enrolled again, it would be a new worker next to the old one's ledger."""
    reason = "the key of slot 0 was set aside by a move"
    moved = {
        MovedAway().command(): '/var/lib/hivewright/worker-0/enrolment.json {"peer_id": "Qm1"}',
        reason: {"success": False, "stderr": reason},
    }
    ill, well = {"slots": 1, "fake_responses": FAKE_ANSWERS | moved}, {"slots": 1}
    done = pyinfra(
        "-y",
        "-vvv",
        "--json",
        write_inventory({"account_host": "192.0.2.10"}, ill, well),
        "deploy.py",
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "failed: @fake/gpu-0 (Check that it can be what the inventory says)"
    )
    said = " ".join(done.stderr.split())
    assert "take the slot out of the inventory and deploy" in said
    assert "`hivewright fleet take-back INVENTORY --limit @fake/gpu-0` gives the key back" in said
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    assert outcomes["Worker | Enrol slot 0"]["success"] == ["@fake/gpu-1"]


def test_key_that_was_set_aside_is_no_hindrance_where_its_slot_is_gone_or_has_another(
    write_inventory: Any, tmp_path: Path
) -> None:
    moved = {MovedAway().command(): "/var/lib/hivewright/worker-1/enrolment.json "}
    refused = {"was set aside by a move": {"success": False, "stderr": "refused"}}
    key = tmp_path / "swarm.pem"
    identity.create(key)
    answers = {"fake_responses": FAKE_ANSWERS | moved | refused}
    hosts = ({"slots": 1} | answers, {"slots": [{}, {"identity": str(key)}]} | answers)
    done = pyinfra(
        "-y", "--json", write_inventory({"account_host": "192.0.2.10"}, *hosts), "deploy.py"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_roles_that_the_inventory_no_longer_names_are_stopped(write_inventory: Any) -> None:
    """A coordinator that became a worker, a worker that became a coordinator, without a judge."""
    was_hub = {ConfiguredServices().command(): "keeper\nchain"}
    was_worker = {ConfiguredSlots().command(): "0"}
    was_judge = {ConfiguredServices().command(): "judge\nkeeper"}
    hub = {"account_host": "192.0.2.10", "market_enabled": False}
    hub["fake_responses"] = FAKE_ANSWERS | was_worker | was_judge
    inventory = write_inventory(
        hub, {"slots": 1, "fake_responses": FAKE_ANSWERS | was_hub}, {"slots": 1}
    )
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    services, slots = (
        "Coordinator | Stop the coordinator's services",
        "Worker | Stop slots that are no longer there",
    )
    assert (outcomes[services]["success"], outcomes[services]["no_change"]) == (
        ["@fake/gpu-0"],
        ["@fake/gpu-1"],
    )
    assert outcomes["Coordinator | Stop services without a task"]["success"] == ["@fake/hub"]
    assert "Coordinator | Run the keeper" in outcomes
    assert "Coordinator | Run the judge" not in outcomes
    assert outcomes[slots]["success"] == ["@fake/hub"]
    assert sorted(outcomes[slots]["no_change"]) == ["@fake/gpu-0", "@fake/gpu-1"]


def test_interrupted_run_ends_with_130_and_names_hosts_that_are_half_done(
    write_inventory: Any,
) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10", "fake_delay": 0.2}, {"slots": 1})
    command = [sys.executable, "-m", "pyinfra", "-y", inventory, "deploy.py"]
    with preloaded.Popen(
        command, PYINFRA, cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as run:
        assert run.stderr is not None
        try:
            # Something of the hub is done by then, and nothing of it is whole.
            for line in run.stderr:
                if "Starting operation: Release | Build" in line:
                    break
            run.send_signal(signal.SIGINT)
            said = run.communicate(timeout=30)[1]
        finally:
            run.kill()
    assert run.returncode == 130, said
    last = said.splitlines()[-1]
    assert last.startswith("interrupted: half done: "), said
    assert "@fake/hub (at: Release | Build the virtual environment of its lock file)" in last
    assert last.endswith("; run it again to continue")


def test_slot_that_leaves_its_model_to_the_machine_from_now_on_enrols_again(
    write_inventory: Any,
) -> None:
    folder = "/var/lib/hivewright/worker-0"
    enrolled = {
        Identities().command(): f"{folder}/enrolment.json " + json.dumps({"peer_id": "Qm1"})
    }
    chosen = {ChosenModels().command(): f"{folder}/model.json"}
    named = {"slots": 1, "fake_responses": FAKE_ANSWERS | enrolled}
    another = {Identities().command(): f"{folder}/enrolment.json " + json.dumps({"peer_id": "Qm2"})}
    third = {Identities().command(): f"{folder}/enrolment.json " + json.dumps({"peer_id": "Qm3"})}
    lacking = {"slots": 1, "model_name": "auto", "fake_responses": FAKE_ANSWERS | another}
    done_before = {
        "slots": 1,
        "model_name": "auto",
        "fake_responses": FAKE_ANSWERS | third | chosen,
    }
    inventory = write_inventory({"account_host": "192.0.2.10"}, named, lacking, done_before)
    done = pyinfra("-y", "--json", inventory, "deploy.py")
    assert done.returncode == 0, done.stderr
    outcomes = {one["name"]: one for one in json.loads(done.stdout)["results"]["operations"]}
    assert outcomes["Worker | Enrol slot 0"]["success"] == ["@fake/gpu-1"]
    assert sorted(outcomes["Worker | Enrol slot 0"]["no_change"]) == ["@fake/gpu-0", "@fake/gpu-2"]

"""The whole deploy.py with pyinfra's command line, on hosts of its @fake connector."""

import ast
import base64
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paramiko import ECDSAKey

from deploys import mesh, operator, units
from deploys.facts import ChosenModels, ConfiguredServices, ConfiguredSlots, Identities, MovedAway
from deploys.fleet.pyinfra_process import Pyinfra
from deploys.inventory import planning, validation
from deploys.inventory.host_plan import HostEntry, Planned
from deploys.inventory.schema import Deployment
from worker.errors import SettingsError
from worker.swarm import identity

CHECKOUT = Path(__file__).parents[2]
PYINFRA_KEYS = ("ssh_hostname", "ssh_user", "_sudo", "_timeout")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What pyinfra's own operations insist on.
FAKE_ANSWERS = {
    "uname -s": "Linux",
    "command -v useradd": "/usr/sbin/useradd",
    "VERSION_CODENAME": "debian,bookworm,x86_64",
}


def pyinfra(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyinfra", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def write_inventory(tmp_path: Path) -> Any:
    def write(hub: dict[str, Any], *workers: dict[str, Any]) -> Path:
        common = {
            "fake_delay": 0.0,
            "fake_delay_jitter": 0.0,
            "fake_responses": FAKE_ANSWERS,
            "release_repository": "https://git.example.org/h.git",
            "release_ref": COMMIT,
            "secrets_dir": str(tmp_path / "secrets"),
        }
        named = [(f"@fake/gpu-{number}", common | data) for number, data in enumerate(workers)]
        file = tmp_path / "fleet.py"
        file.write_text(f"coordinators = [('@fake/hub', {common | hub!r})]\nworkers = {named!r}\n")
        return file

    return write


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


def assert_refused(done: subprocess.CompletedProcess[str], *lines: str) -> None:
    """Assert exit code 2 with these last lines, before pyinfra loaded any hosts."""
    assert done.returncode == 2, done.stderr
    assert tuple(done.stderr.splitlines()) == ("--> Loading config...", *lines)


def test_all_mistakes_stop_the_run_before_any_host_is_connected_to(
    write_inventory: Any, tmp_path: Path
) -> None:
    inventory = write_inventory(
        {"account_host": "192.0.2.10"},
        {"slots": [{"model_dvice": "cpu"}], "trainer_epsilon": "a"},
        {"slots": 0, "release_repository": "/nowhere", "release_ref": "main"},
    )
    done = pyinfra("-y", "-vvv", inventory, "deploy.py")
    assert_refused(
        done,
        f"{inventory}: 4 mistakes; nothing was done on any host",
        "inventory data of @fake/gpu-0: trainer_epsilon: got 'a'; expected a number",
        "inventory data of @fake/gpu-0: slot 0: model_dvice: not a known key; did you mean"
        " model_device?",
        "inventory data of @fake/gpu-1: slots: got 0; expected auto, a count of at least 1, or a"
        " list with a dict of settings for each",
        "inventory data of @fake/gpu-1: release_repository: got '/nowhere'; can't be read:"
        " '/nowhere' does not appear to be a git repository",
    )
    assert not (tmp_path / "secrets").exists()


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


def test_what_an_inventory_says_in_vain_is_named(tmp_path: Path) -> None:
    """The deploy reports entries that pyinfra itself would silently ignore."""
    inventory = tmp_path / "fleet.py"
    inventory.write_text(
        "trainer_learning_rate = 1e-5\ncoordinators = ['hub', 'hub']\nworkers = ['a', ('b',"
        " {'slots': 1})]\nall = (['a', 'hub'], {'release_ref': 'main'})\n"
    )
    assert_refused(
        pyinfra("-y", inventory, "deploy.py"),
        f"{inventory}: 3 mistakes; nothing was done on any host",
        f"{inventory}: trainer_learning_rate: is not in the data of any host and has no effect; put"
        " it into the data of a host, or of all",
        f"{inventory}: coordinators: hub is there 2 times; expected each host once",
        f"{inventory}: workers: b is not in all; add it there",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"workers = [\n    ('a', {'slots': auto})]\n",
            " line 2: NameError: name 'auto' is not defined",
        ),
        (b"import nosuch\n", " line 1: ModuleNotFoundError: No module named 'nosuch'"),
        (b"\xff\xfe", ": is not UTF-8 text; expected Python, a copy of inventory/example.py"),
    ],
)
def test_inventory_that_is_no_sound_python_is_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "fleet.py").write_bytes(content)
    assert_refused(
        pyinfra("-y", tmp_path / "fleet.py", "deploy.py"), f"{tmp_path}/fleet.py{message}"
    )


def test_wrong_key_does_not_need_a_host_that_can_be_reached(tmp_path: Path) -> None:
    inventory = tmp_path / "fleet.py"
    data = {"ssh_port": 1, "slot": 1, "release_repository": "h.git", "release_ref": COMMIT}
    inventory.write_text(f"coordinators = [('127.0.0.1', {data!r})]\n")
    assert_refused(
        pyinfra("-y", inventory, "deploy.py"),
        "inventory data of 127.0.0.1: slot: not a known key; did you mean slots?",
    )


def test_wrong_key_does_not_need_the_host_that_has_it(write_inventory: Any) -> None:
    """All hosts are checked, including those outside of `--limit`."""
    inventory = write_inventory({"account_host": "192.0.2.10"}, {"slots": 1}, {"slot": 1})
    done = pyinfra("-y", inventory, "deploy.py", "--limit", "@fake/gpu-0")
    assert done.returncode == 2
    assert (
        "inventory data of @fake/gpu-1: slot: not a known key; did you mean slots?" in done.stderr
    )


def test_wrong_way_to_a_host_is_refused_without_what_may_be_secret(tmp_path: Path) -> None:
    data = {
        "ssh_port": "22",
        "ssh_password": 12345,
        "release_repository": "h.git",
        "release_ref": COMMIT,
    }
    (tmp_path / "fleet.py").write_text(f"coordinators = [('hub', {data!r})]\n")
    assert_refused(
        pyinfra("-y", tmp_path / "fleet.py", "deploy.py"),
        f"{tmp_path}/fleet.py: 2 mistakes; nothing was done on any host",
        "inventory data of hub: ssh_password: got int; expected str",
        "inventory data of hub: ssh_port: got '22'; expected int",
    )


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({"_sudo": "yes"}, "_sudo: got 'yes'; expected bool"),
        ({"_sudo": 1}, "_sudo: got 1; expected bool"),
        ({"_sudo_user": True}, "_sudo_user: got True; expected str"),
        ({"_timeout": "60"}, "_timeout: got '60'; expected int"),
        ({"_sudo_password": 12345}, "_sudo_password: got int; expected str"),
    ],
)
def test_keys_of_pyinfras_own_are_refused_where_their_type_is_wrong(
    tmp_path: Path, own: dict[str, Any], line: str
) -> None:
    data = {"release_repository": "h.git", "release_ref": COMMIT} | own
    (tmp_path / "fleet.py").write_text(f"coordinators = [('hub', {data!r})]\n")
    assert_refused(
        pyinfra("-y", tmp_path / "fleet.py", "deploy.py"), f"inventory data of hub: {line}"
    )


def test_ways_that_end_pyinfra_are_refused_with_their_hosts(tmp_path: Path) -> None:
    """All other mistakes are reported too, such as a repository that cannot be read."""
    (tmp_path / "no.key").write_text("x")
    ECDSAKey.generate().write_private_key_file(str(tmp_path / "a.key"))
    ways = {
        "gpu-1": {"ssh_key": "/nowhere"},
        "gpu-2": {"ssh_key": str(tmp_path / "no.key")},
        "gpu-3": {"ssh_hostname": "gpu-3..example.org", "ssh_key": str(tmp_path / "a.key")},
        "gpu-4": {"ssh_port": -1},
        "gpu-5": {"ssh_port": 99999999, "release_repository": "https://[x"},
        "gpu..6": {"release_ref": "a\0b"},
        "gpu-7": {"ssh_hostname": "192.0.2.7:22"},
        "gpu-8": {"ssh_hostname": "2001:db8::8"},
    }
    common = {
        "slots": 1,
        "swarm_enabled": False,
        "release_repository": "h.git",
        "release_ref": COMMIT,
    }
    common["secrets_dir"] = str(tmp_path / "no.key")
    named = [(name, common | way) for name, way in ways.items()]
    (tmp_path / "fleet.py").write_text(f"workers = {named!r}\n")
    key, name = (
        "expected the file of a private key",
        "expected a name or an address, without a port (ssh_port)",
    )
    assert_refused(
        pyinfra("-y", tmp_path / "fleet.py", "deploy.py"),
        f"{tmp_path}/fleet.py: 10 mistakes; nothing was done on any host",
        f"inventory data of gpu-1: ssh_key: No such private key file: /nowhere; {key}",
        f"inventory data of gpu-2: ssh_key: Invalid private key file: {tmp_path}/no.key; {key}",
        f"inventory data of gpu-3: ssh_hostname: got 'gpu-3..example.org'; {name}",
        "inventory data of gpu-4: ssh_port: got -1; expected a port from 1 to 65535",
        "inventory data of gpu-5: ssh_port: got 99999999; expected a port from 1 to 65535",
        f"inventory data of gpu..6: ssh_hostname: got 'gpu..6'; {name}",
        f"inventory data of gpu-7: ssh_hostname: got '192.0.2.7:22'; {name}",
        "inventory data of gpu-5: release_repository: not a URL; expected one such as"
        " https://git.example.org/hivewright.git",
        "inventory data of gpu..6: release_ref: has a zero byte, or half a character; expected"
        " text",
        "inventory data of gpu-1, gpu-2, gpu-3, gpu-4, gpu-7, gpu-8: secrets_dir:"
        f" {tmp_path}/no.key is not a folder; expected one for what must not be in an inventory",
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("-y", "inventory/exmple.py", "deploy.py"),
            "inventory/exmple.py: no such file; did you mean inventory/example.py?",
        ),
        (
            ("-y", "nowhere/fleet.py", "deploy.py"),
            (
                "nowhere/fleet.py: no such file; expected an inventory file, a copy of"
                " inventory/example.py"
            ),
        ),
        (
            ("-y", "gpu-1,gpu-2", "deploy.py"),
            "gpu-1,gpu-2: no such file; expected an inventory file, a copy of inventory/example.py",
        ),
        (
            ("inventory/exmple.py", "fact", "server.Date"),
            "inventory/exmple.py: no such file; did you mean inventory/example.py?",
        ),
        (
            ("-y", "inventory/local.py", "deploy.py", "--limit", "gpu-9"),
            "inventory/local.py: --limit gpu-9: no such host or group",
        ),
    ],
)
def test_run_that_would_do_nothing_is_refused(arguments: tuple[str, ...], line: str) -> None:
    assert_refused(pyinfra(*arguments), line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("workers = []\n", "no hosts; expected lists of hosts, named coordinators and workers"),
        ("", "no hosts; expected lists of hosts, named coordinators and workers"),
        ("workers = ['@nothing/x']\n", "Invalid connector: nothing"),
    ],
)
def test_inventory_without_hosts_is_refused(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.py").write_text(text)
    assert_refused(
        pyinfra("-y", tmp_path / "fleet.py", "deploy.py"), f"{tmp_path}/fleet.py: {line}"
    )


def test_inventory_that_is_no_python_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "fleet.py").write_text("workers = [\n    ('gpu-1', {'slots': 1}\n]\n")
    done = pyinfra("-y", tmp_path / "fleet.py", "deploy.py")
    assert_refused(
        done,
        f"{tmp_path}/fleet.py line 3: closing parenthesis ']' does not match opening parenthesis"
        " '(' on line 2; expected Python",
    )


def test_run_that_could_not_ask_says_so(write_inventory: Any) -> None:
    done = pyinfra(write_inventory({"account_host": "192.0.2.10"}, {"slots": 1}), "deploy.py")
    assert_refused(
        done,
        "no terminal to confirm the changes at; put -y before the inventory, or --dry to see them",
    )


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
    """A coordinator that became a worker, and a worker that became the coordinator only."""
    was_hub = {ConfiguredServices().command(): "keeper\nchain"}
    was_worker = {ConfiguredSlots().command(): "0"}
    hub = {"account_host": "192.0.2.10", "fake_responses": FAKE_ANSWERS | was_worker}
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
    assert outcomes[slots]["success"] == ["@fake/hub"]
    assert sorted(outcomes[slots]["no_change"]) == ["@fake/gpu-0", "@fake/gpu-1"]


def test_interrupted_run_ends_with_130_and_names_hosts_that_are_half_done(
    write_inventory: Any,
) -> None:
    inventory = write_inventory({"account_host": "192.0.2.10", "fake_delay": 0.2}, {"slots": 1})
    command = [sys.executable, "-m", "pyinfra", "-y", inventory, "deploy.py"]
    with subprocess.Popen(
        command, cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
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
    assert last.endswith("; run it again to go on")


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


def test_ssh_keys_that_all_hosts_share_do_not_hurt_this_machine(tmp_path: Path) -> None:
    """Group data may contain ssh_port for other hosts; a misspelt one is a mistake all the same."""
    inventory = tmp_path / "fleet.py"
    data = {"ssh_port": 22, "ssh_prt": 1, "release_repository": "h.git", "release_ref": COMMIT}
    inventory.write_text(f"coordinators = ['@local']\nall = (['@local'], {data!r})\n")
    assert_refused(
        pyinfra("-y", inventory, "deploy.py"),
        "inventory data of @local: ssh_prt: not a known key; did you mean ssh_port?",
    )


@pytest.mark.parametrize("name", ["example", "local"])
def test_shipped_inventory_is_right(name: str) -> None:
    done = pyinfra("--json", f"inventory/{name}.py", "debug-inventory")
    assert done.returncode == 0, done.stderr
    entries = [
        HostEntry(host["name"], host["groups"], host["data"], PYINFRA_KEYS)
        for host in json.loads(done.stdout)
    ]
    plans = validation.check(entries)
    assert sum(len(plan.slots) for plan in plans.values()) >= 1
    assert sum(bool(plan.services) for plan in plans.values()) == 1
    assert all(entry.data["_timeout"] == 120 for entry in entries)


def test_example_inventory_has_the_defaults_of_the_keys_that_it_names() -> None:
    text = (CHECKOUT / "inventory/example.py").read_text()
    commented = dict(re.findall(r'^ +# "(\w+)": (.*),$', text, re.MULTILINE))
    assert {"tailscale_serve", "wireguard_subnet", "break_lock"} <= commented.keys()
    for key, field in Deployment.model_fields.items():
        if key in commented:
            assert ast.literal_eval(commented[key]) == field.default, key


def test_lab_inventory_says_how_to_get_to_its_hosts() -> None:
    assert_refused(
        pyinfra("-y", "inventory/lab.py", "deploy.py"),
        "inventory/lab.py: not in the lab's network; put `ip netns exec lab-op` before the command,"
        " or use `make fleet`",
    )

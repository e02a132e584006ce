"""Inventories that deploy.py refuses before it connects to a host, and those that are shipped."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_hosts import CHECKOUT, COMMIT, PYINFRA_KEYS, assert_refused, pyinfra
from paramiko import ECDSAKey

from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry
from deploys.inventory.schema import Deployment


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
        f" {tmp_path}/no.key is not a folder; expected one for secrets",
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

"""Inventories from existing lists: the result, and messages about mistakes."""

import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hosts import pyinfra
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys.inventory import importers
from worker.errors import SettingsError

INI = """\
# a fleet
plain ansible_host=192.0.2.9

[coordinators]
hub ansible_host=192.0.2.10 account_host=192.0.2.10 ansible_user=admin ansible_become=yes

[gpus]
gpu[01:03] slots=2 ansible_port=2222  # three
[gpus:vars]
ntp_server=192.0.2.1
model_threads=8
ansible_python_interpreter=/usr/bin/python3
[fleet:children]
gpus
[fleet:vars]
model_threads=4
watchdog_seconds=600
"""
# ansible-core 2.19.14 prints this for it.
LISTING = {
    "_meta": {
        "hostvars": {
            **{
                f"gpu0{number}": {
                    "ansible_port": 2222,
                    "ansible_python_interpreter": "/usr/bin/python3",
                    "model_threads": 8,
                    "ntp_server": "192.0.2.1",
                    "slots": 2,
                    "watchdog_seconds": 600,
                }
                for number in (1, 2, 3)
            },
            "hub": {
                "account_host": "192.0.2.10",
                "ansible_become": "yes",
                "ansible_host": "192.0.2.10",
                "ansible_user": "admin",
            },
            "plain": {"ansible_host": "192.0.2.9"},
        },
        "profile": "inventory_legacy",
    },
    "all": {"children": ["ungrouped", "coordinators", "fleet"]},
    "coordinators": {"hosts": ["hub"]},
    "fleet": {"children": ["gpus"]},
    "gpus": {"hosts": ["gpu01", "gpu02", "gpu03"]},
    "ungrouped": {"hosts": ["plain"]},
}
TABLE = "a CSV table with a first line such as name,group,ssh_hostname,slots"
HUB = (
    "hub",
    {
        "ssh_hostname": "192.0.2.10",
        "account_host": "192.0.2.10",
        "ssh_user": "admin",
        "_sudo": True,
    },
)


def made(form: str, text: str, folder: Path, name: str = "list") -> dict[str, Any]:
    """Return the groups of the resulting inventory, and its text."""
    (folder / name).write_text(text)
    inventory = folder / "made.py"
    inventory.write_text(importers.inventory_text(form, folder / name))
    return {
        key: value
        for key, value in runpy.run_path(str(inventory)).items()
        if not key.startswith("_")
    }


def refused(form: str, text: str, folder: Path, name: str = "list") -> list[str]:
    with pytest.raises(SettingsError) as error:
        made(form, text, folder, name)
    return str(error.value).replace(str(folder / name), "LIST").splitlines()


def test_csv_columns_are_keys_and_cells_are_values(tmp_path: Path) -> None:
    text = (
        "name,group,ssh_hostname,slots,trainer_learning_rate,account_host\n"
        "hub,coordinators,192.0.2.10,,,192.0.2.10\n\n"
        'gpu-1,,192.0.2.21,"[{""gpu"": 0}, {""gpu"": 0}]",1e-5,\n'
        "gpu-2,,192.0.2.22,,,\n"
    )
    assert made("csv", text, tmp_path) == {
        "coordinators": [("hub", {"ssh_hostname": "192.0.2.10", "account_host": "192.0.2.10"})],
        "workers": [
            (
                "gpu-1",
                {
                    "ssh_hostname": "192.0.2.21",
                    "slots": [{"gpu": 0}, {"gpu": 0}],
                    "trainer_learning_rate": 1e-5,
                },
            ),
            ("gpu-2", {"ssh_hostname": "192.0.2.22", "slots": "auto"}),
        ],
    }


def test_csv_of_a_spreadsheet_may_begin_with_its_mark(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("name,slots\ngpu-1,1\n".encode("utf-8-sig"))
    assert "gpu-1" in importers.inventory_text("csv", tmp_path / "list.csv")


def test_all_mistakes_of_a_csv_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        "name,slots,ssh_port,ssh_hostname,modle_name\ngpu-1,two,22,::1,\n"
        "gpu-2,1,http,192.0.2.2:22,tiny\ngpu-1,1,,,\n"
    )
    assert refused("csv", text, tmp_path) == [
        (
            "LIST line 3: gpu-2: ssh_hostname: got '192.0.2.2:22'; expected a name or an address,"
            " without a port (ssh_port)"
        ),
        "LIST line 3: gpu-2: ssh_port: got 'http'; expected int",
        "LIST line 4: gpu-1: is in LIST line 2 too; expected a host once",
        (
            "LIST line 2: gpu-1: slots: got 'two'; expected auto, a count of at least 1, or a list"
            " with a dict of settings for each"
        ),
        "LIST line 3: gpu-2: modle_name: not a known key; did you mean model_name?",
    ]


def test_list_from_standard_input_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("name,slots\ngpu-1,two\n"))
    with pytest.raises(SettingsError, match=r"^standard input line 2: gpu-1: slots: got 'two'"):
        importers.inventory_text("csv", Path("-"))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [f"LIST line 1: no column `name`; expected {TABLE}"]),
        (
            "name,group,slots,slots\ngpu-1,wokers,1,1\n,,1,1\ngpu-3,1\n",
            [
                "LIST line 1: column 'slots' is there twice",
                "LIST line 2: group: got 'wokers'; expected workers or coordinators",
                "LIST line 3: name: none; expected the host's",
                "LIST line 4: 2 cells; expected 4, as many as there are columns",
            ],
        ),
        ("name\n", [f"LIST: no hosts; expected {TABLE}"]),
        (
            f"name,slots\ngpu-1,1\ngpu-2,{'1' * 200_000}\n",
            [f"LIST line 3: field larger than field limit (131072); expected {TABLE}"],
        ),
        (
            "name,slots\n../../etc,1\n",
            [
                "LIST line 2: name: got '../../etc';"
                " expected letters, digits, dots, hyphens or underscores"
            ],
        ),
    ],
)
def test_csv_that_is_no_table_of_hosts_is_refused(
    text: str, lines: list[str], tmp_path: Path
) -> None:
    assert refused("csv", text, tmp_path) == lines


def stand_in_ansible(
    folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, stderr: str = "", code: int = 0
) -> Path:
    """Put a program called ansible-inventory first in PATH; return the file of its arguments."""
    programs = folder / "programs"
    programs.mkdir()
    (folder / "output").write_text(output)
    (folder / "stderr").write_text(stderr)
    (programs / "ansible-inventory").write_text(
        f'#!/bin/sh\necho "$@" > {folder}/arguments\n'
        f"cat {folder}/output; cat {folder}/stderr >&2; exit {code}\n"
    )
    (programs / "ansible-inventory").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return folder / "arguments"


def assert_fleet(found: dict[str, Any]) -> None:
    gpu = {"watchdog_seconds": 600, "model_threads": 8, "slots": 2, "ssh_port": 2222}
    workers = dict(found["workers"])
    assert workers.pop("plain") == {"ssh_hostname": "192.0.2.9", "slots": "auto"}
    assert workers == {f"gpu0{n}": gpu for n in (1, 2, 3)}
    assert found["coordinators"] == [HUB]


def test_ansible_inventory_is_read_by_ansible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = stand_in_ansible(tmp_path, monkeypatch, json.dumps(LISTING))
    assert_fleet(made("ansible", INI, tmp_path))
    assert arguments.read_text().split() == ["--inventory", str(tmp_path / "list"), "--list"]


@pytest.mark.skipif(shutil.which("ansible-inventory") is None, reason="needs Ansible")
def test_ansible_reads_the_inventory_as_recorded(tmp_path: Path) -> None:
    assert_fleet(made("ansible", INI, tmp_path))
    (said,) = refused("ansible", "[gpus\n", tmp_path)
    assert said.startswith("LIST: ansible-inventory failed: ")
    assert "; Failed to parse inventory: " in said


def test_listing_by_ansible_is_read_without_ansible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_fleet(made("ansible", json.dumps(LISTING), tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(LISTING)))
    assert '"gpu01"' in importers.inventory_text("ansible", Path("-")).replace("'", '"')


def test_groups_in_each_other_end(tmp_path: Path) -> None:
    circle = {
        "_meta": {"hostvars": {}},
        "coordinators": {"children": ["a"]},
        "a": {"hosts": ["hub"], "children": ["coordinators"]},
    }
    assert [name for name, _ in made("ansible", json.dumps(circle), tmp_path)["coordinators"]] == [
        "hub"
    ]


def listing(**variables: Any) -> str:
    return json.dumps({"_meta": {"hostvars": {"gpu": variables}}, "gpus": {"hosts": ["gpu"]}})


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (listing(slot=1), ["LIST: gpu: slot: not a known key; did you mean slots?"]),
        (
            listing(ansible_host="{{ip}}", ansible_ssh_pass="x", slots={"__ansible_vault": "x"}),
            [
                ("LIST: gpu: ansible_host: a template, or encrypted; expected a plain value"),
                (
                    "LIST: gpu: ansible_ssh_pass: a password must not be in an inventory; expected"
                    " ssh keys, and sudo without a password, or with one in a local file that"
                    " _sudo_password_file names"
                ),
                "LIST: gpu: slots: a template, or encrypted; expected a plain value",
            ],
        ),
        (
            listing(
                swarm_announce=["{{ public_address }}"],
                environment_families=[
                    {"name": "bf", "config": {"length": {"__ansible_vault": ""}}}
                ],
                log_level="{% if debug %}DEBUG{% endif %}",
                motd=["{{ of_their_own }}"],
            ),
            [
                f"LIST: gpu: {key}: a template, or encrypted; expected a plain value"
                for key in ("swarm_announce", "environment_families", "log_level")
            ],
        ),
        (listing(ansible_host=""), ["LIST: gpu: ssh_hostname: got ''; expected str, not empty"]),
        (listing(ansible_become="maybe"), ["LIST: gpu: _sudo: got 'maybe'; expected bool"]),
        (
            '{"_meta": {"hostvars": {"gpu": 3}}}',
            [
                "LIST: hostvars.gpu: Input should be a valid dictionary; expected the"
                " output of `ansible-inventory --list`"
            ],
        ),
        (
            '{"_meta": {}, "gpus": {"hosts": {"gpu": {}}}}',
            [
                "LIST: gpus.hosts: Input should be a valid list; expected the"
                " output of `ansible-inventory --list`"
            ],
        ),
    ],
)
def test_ansible_listing_with_mistakes_is_refused(
    text: str, lines: list[str], tmp_path: Path
) -> None:
    assert refused("ansible", text, tmp_path) == lines


def test_failure_of_ansible_is_reported_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = (
        "[WARNING]: Failed to parse inventory with 'ini' plugin: Failed to parse inventory: x\n\n"
        "Failed to parse inventory with 'ini' plugin.\n\n<<< caused by >>>\n\n"
        "Failed to parse inventory: Adding group 'a' as child to 'b' creates a recursive"
        " dependency loop.\nOrigin: list\n\n[ERROR]: No inventory was parsed\n"
    )
    stand_in_ansible(tmp_path, monkeypatch, "", stderr, code=1)
    assert refused("ansible", "[a:children]\nb\n", tmp_path) == [
        "LIST: ansible-inventory failed: Failed to parse inventory: Adding group 'a' as child to"
        " 'b' creates a recursive dependency loop."
    ]


def test_inventory_without_ansible_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("ansible", INI, tmp_path) == [
        "LIST: ansible-inventory is not in PATH, and only Ansible can read its inventories;"
        " install ansible-core, or run `ansible-inventory -i LIST --list > hosts.json` where it"
        " is installed, and import hosts.json"
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(INI))
    with pytest.raises(SettingsError, match=r"^standard input: not an inventory as JSON; expected"):
        importers.inventory_text("ansible", Path("-"))


@pytest.mark.usefixtures("usual_recursion_limit")
def test_list_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (said,) = refused("ansible", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", tmp_path)
    assert said.startswith("LIST: is nested too deep; expected ")


def node(
    name: str, address: str, tags: tuple[str, ...] = (), system: str = "linux"
) -> dict[str, Any]:
    found = {
        "HostName": name,
        "DNSName": f"{name}.tail1.ts.net.",
        "OS": system,
        "TailscaleIPs": [address, "fd7a::1"],
    }
    return found | ({"Tags": list(tags)} if tags else {})


def test_tailnet_gives_its_linux_machines_and_those_that_are_tagged_if_any_are(
    tmp_path: Path,
) -> None:
    laptop, gpu = node("laptop", "100.64.0.1", system="macOS"), node("gpu-1", "100.64.0.2")
    status = {
        "Self": laptop,
        "Peer": {"k1": gpu, "k2": node("phone", "100.64.0.3", system="android")},
    }
    worker = ("gpu-1", {"ssh_hostname": "100.64.0.2", "slots": "auto"})
    found = made("tailscale", json.dumps(status), tmp_path)
    assert found["workers"] == [worker]
    assert found["all"] == (["gpu-1"], {})
    status["Peer"] |= {
        "k1": node("gpu-1", "100.64.0.2", ("tag:hivewright",)),
        "k3": node("nas", "100.64.0.4"),
        "k4": node("hub", "100.64.0.5", ("tag:hivewright-coordinator",)),
    }
    assert made("tailscale", json.dumps(status), tmp_path) == {
        "coordinators": [("hub", {"ssh_hostname": "100.64.0.5", "account_host": "100.64.0.5"})],
        "workers": [worker],
    }


def test_operators_own_machine_is_no_worker_unless_it_has_the_tag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {"Self": node("laptop", "100.64.0.1"), "Peer": {"k1": node("gpu-1", "100.64.0.2")}}
    assert [name for name, _ in made("tailscale", json.dumps(status), tmp_path)["workers"]] == [
        "gpu-1"
    ]
    said = capsys.readouterr().err
    assert said.endswith(
        ": laptop: left out: the list was made there; the tag tag:hivewright would include it\n"
    )
    status["Self"] = node("laptop", "100.64.0.1", ("tag:hivewright",))
    assert [name for name, _ in made("tailscale", json.dumps(status), tmp_path)["workers"]] == [
        "laptop"
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["{}", "[]", "tailscale: not logged in", '{"Self": {}}'])
def test_what_is_no_tailscale_status_is_refused(text: str, tmp_path: Path) -> None:
    (line,) = refused("tailscale", text, tmp_path)
    assert line.endswith("; expected the output of `tailscale status --json`, with Linux machines")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"DNSName": None, "HostName": None},
            "LIST: DNSName and HostName: none; expected a machine's name",
        ),
        (
            {"TailscaleIPs": "100.64.0.2"},
            "LIST: gpu-1: TailscaleIPs: got '100.64.0.2'; expected an address, is it logged in?",
        ),
        (
            {"TailscaleIPs": None},
            "LIST: gpu-1: TailscaleIPs: got None; expected an address, is it logged in?",
        ),
        (
            {"TailscaleIPs": ["100.64.0.9"]},
            (
                "LIST: gpu-1: ssh_hostname: 100.64.0.9, port 22, is that of gpu-9 too; expected"
                " another for each host"
            ),
        ),
    ],
)
def test_machine_of_a_tailnet_without_a_name_or_an_address_of_its_own_is_refused(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    peers = {"k9": node("gpu-9", "100.64.0.9"), "k1": node("gpu-1", "100.64.0.2") | changes}
    nodes = {"Self": node("laptop", "100.64.0.1", system="macOS"), "Peer": peers}
    assert refused("tailscale", json.dumps(nodes), tmp_path) == [line]


def test_machine_without_a_name_in_the_tailnet_has_that_of_its_own(tmp_path: Path) -> None:
    own = node("laptop", "100.64.0.1")
    nodes = {"Self": own, "Peer": {"k1": node("gpu-1", "100.64.0.2") | {"DNSName": None}}}
    assert made("tailscale", json.dumps(nodes), tmp_path)["workers"][0][0] == "gpu-1"


def test_command_prints_an_inventory_that_pyinfra_reads(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text(json.dumps(LISTING))
    command = [sys.executable, "-m", "worker", "inventory", "ansible"]
    done = subprocess.run(
        [*command, tmp_path / "fleet.json"], capture_output=True, text=True, timeout=30, check=True
    )
    (tmp_path / "fleet.py").write_text(done.stdout)
    shown = pyinfra("--json", tmp_path / "fleet.py", "debug-inventory")
    assert shown.returncode == 0, shown.stderr
    assert {host["name"] for host in json.loads(shown.stdout)} == {
        "hub",
        "plain",
        "gpu01",
        "gpu02",
        "gpu03",
    }
    missing = subprocess.run(
        [*command, "/nowhere"], capture_output=True, text=True, timeout=30, check=False
    )
    assert missing.returncode == 2
    assert (
        missing.stderr
        == "hivewright inventory: SettingsError (exit 2): /nowhere: can't be read: No such file or"
        " directory; expected an Ansible inventory, or the output of `ansible-inventory --list`\n"
    )


def test_mark_of_a_spreadsheet_is_left_out_of_piped_text_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffname,slots\ngpu-1,2\n"))
    assert "('gpu-1', {'slots': 2})" in importers.inventory_text("csv", Path("-"))


@pytest.mark.parametrize("name", ["a, b", "a: b", "gpu 1", "-gpu", "gpu\n1", "é", ""])
def test_name_that_no_host_can_have_is_a_mistake_next_to_those_of_other_hosts(
    name: str, tmp_path: Path
) -> None:
    """Messages of the deploy's own check are found by the names of hosts in them."""
    listing = {"_meta": {"hostvars": {name: {"slots": 0}, "gpu-2": {"slots": 0}}}}
    assert refused("ansible", json.dumps(listing), tmp_path) == [
        f"LIST: name: got {name!r}; expected letters, digits, dots, hyphens or underscores",
        "LIST: gpu-2: slots: got 0; expected auto, a count of at least 1, or a list with a dict of"
        " settings for each",
    ]


_CELLS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["NaN", "-1", "1e999", "null", "true", "[{}]", '{"a": 1}', "auto", "a, b", "x: y"]
    ),
)
_COLUMNS = st.sampled_from(
    [
        "name",
        "group",
        "slots",
        "ssh_port",
        "ssh_hostname",
        "_sudo",
        "metrics_port",
        "log_level",
        "x",
    ]
)


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(
    columns=st.lists(_COLUMNS, max_size=4), rows=st.lists(st.lists(_CELLS, max_size=4), max_size=3)
)
def test_any_table_is_an_inventory_or_refused_in_lines_that_name_its_place(
    columns: list[str], rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "table.csv"
    with file.open("w", newline="", errors="replace") as stream:
        csv.writer(stream).writerows([["name", *columns], *rows])
    text, message = _inventory_or_refusal("csv", file)
    if text is None:
        assert message.startswith(str(file))
        return
    groups = runpy.run_path(str(_written(file.with_name("made_of_table.py"), text)))
    hosts = [*groups.get("workers", ()), *groups.get("coordinators", ())]
    assert 0 < len(hosts) <= len(rows)
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name) for name, _ in hosts)


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(data=st.data())
@pytest.mark.parametrize("form", ["tailscale", "ansible"])
def test_any_listing_is_an_inventory_or_refused(
    form: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    usual: dict[str, Any] = (
        {"Self": node("own", "100.64.0.1"), "Peer": {"k": node("gpu", "100.64.0.2")}}
        if form == "tailscale"
        else {"_meta": {"hostvars": {"gpu": {"slots": 1}}}, "gpus": {"hosts": ["gpu"]}}
    )
    place = usual
    for key in data.draw(
        st.sampled_from([["Self"], ["Peer", "k"], ["Peer"], ["_meta"], ["gpus"], []])
    ):
        place = place.get(key, place)
    place[data.draw(st.sampled_from([*place, "hosts", "hostvars"]))] = data.draw(_JSON)
    file = _written(tmp_path_factory.getbasetemp() / "listing.json", json.dumps(usual))
    text, message = _inventory_or_refusal(form, file)
    if text is None:
        assert message.startswith(str(file))
    else:
        compile(text, "made", "exec")


def _inventory_or_refusal(form: str, file: Path) -> tuple[str | None, str]:
    try:
        return importers.inventory_text(form, file), ""
    except SettingsError as error:
        return None, str(error)

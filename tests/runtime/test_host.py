"""The host before a role starts: ports, disk, an exclusive folder, addresses of interfaces."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.limits import without_rights
from worker.errors import ResourceError
from worker.runtime import host as host_module


def test_port_in_use_is_named_with_its_setting():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ResourceError) as caught:
            host_module.require_port("127.0.0.1", port, "swarm.port")
    assert (
        str(caught.value)
        == f"port {port} (swarm.port): already in use on 127.0.0.1; free it or set another, 0 lets"
        " the kernel choose"
    )


def test_free_port_and_port_0_pass():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host_module.require_port("127.0.0.1", port, "swarm.port")
    host_module.require_port("127.0.0.1", 0, "swarm.port")


@pytest.mark.parametrize("port", [0, 3001])
@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.77", "no address of this machine"),
        ("2001:db8::77", "no address of this machine"),
        ("http://x", ""),  # in the words of the resolver
        ("a..b", ""),
    ],
)
def test_host_that_is_not_this_machines_is_named_and_not_the_port(host, reason, port):
    with pytest.raises(ResourceError) as caught:
        host_module.require_port(host, port, "dashboard.port")
    assert str(caught.value).startswith(f"{host} (dashboard.host): {reason}")
    assert str(caught.value).endswith(
        "; expected an address of this machine, or 0.0.0.0 for all of them"
    )


def test_full_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ResourceError) as caught:
        host_module.require_disk(tmp_path / "state", 10**9)
    assert str(caught.value).startswith(f"{tmp_path / 'state'} (node.state_dir): ")
    assert str(caught.value).endswith(
        "MB free; expected at least 1000000000 MB (node.min_free_disk_mb); make room or name a"
        " folder on another disk"
    )
    assert list((tmp_path / "state").iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"file/state \(node.state_dir\): Not a directory"):
        host_module.require_disk(tmp_path / "file/state", 1)


def test_second_process_in_a_folder_is_refused_with_the_pid_of_the_first(tmp_path):
    code = (
        "import sys, pathlib; from worker.runtime import host; lock ="
        " host.lock_folder(pathlib.Path(sys.argv[1]), 'node.state_dir'); print('locked',"
        " flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ResourceError, match=f"in use by process {first.pid}; stop that one"):
            host_module.lock_folder(tmp_path, "node.state_dir")
        first.kill()
    with host_module.lock_folder(tmp_path, "node.state_dir"):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_free_ports_differ_and_are_free():
    names = [f"role-{number}" for number in range(20)]
    ports = host_module.free_ports(names)
    assert list(ports) == names
    assert len(set(ports.values())) == 20
    for port in ports.values():
        host_module.require_port("127.0.0.1", port, "x.port")
    assert host_module.free_ports([]) == {}


def test_privileged_port_without_rights_is_named(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ResourceError, match=r"^port 80 \(account.port\): Permission denied on ::;"):
        host_module.require_port("::", 80, "account.port")


@pytest.mark.parametrize(
    ("free_bytes", "is_enough"),
    [(100 * 10**6, True), (100 * 10**6 - 1, False), (0, False), (2**60, True)],
)
def test_disk_has_at_least_the_free_space_of_the_settings(
    tmp_path, monkeypatch, free_bytes, is_enough
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    if is_enough:
        host_module.require_disk(tmp_path / "a/b", 100)
        assert (tmp_path / "a/b").is_dir()
    else:
        with pytest.raises(ResourceError, match="MB free; expected at least 100 MB"):
            host_module.require_disk(tmp_path / "a/b", 100)


def test_folder_in_one_without_rights_is_named(tmp_path):
    with without_rights(tmp_path), pytest.raises(ResourceError) as refusal:
        host_module.require_disk(tmp_path / "state", 1, "account.state_dir")
    assert str(refusal.value) == (
        f"{tmp_path}/state (account.state_dir): Permission denied; expected a folder that can be"
        " written"
    )


def test_lock_of_a_process_that_wrote_no_id_is_still_a_lock(tmp_path):
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match=r"in use by process unknown; stop that"):
            host_module.lock_folder(tmp_path, "x.state_dir")


def test_lock_ends_with_its_file_and_the_next_owner_replaces_the_id(tmp_path):
    (tmp_path / "lock").write_text("123456789 of an owner before")
    for _ in range(2):
        with host_module.lock_folder(tmp_path, "x.state_dir"):
            assert (tmp_path / "lock").read_text() == str(os.getpid())
            with pytest.raises(ResourceError, match=f"in use by process {os.getpid()};"):
                host_module.lock_folder(tmp_path, "x.state_dir")


def test_address_of_loopback_is_found_and_of_nothing_is_not():
    assert host_module.interface_address("lo") == "127.0.0.1"
    assert host_module.interface_address("nothing0") is None
    assert host_module.interface_address("nothing0", socket.AF_INET6) is None


def test_name_that_no_interface_can_have_is_not_shortened_to_one_that_it_begins_with(monkeypatch):
    asked = []

    def ioctl(_, request, argument):
        asked.append(argument)
        raise OSError(19, "No such device")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert host_module.interface_address("a" * 15) is None
    assert host_module.interface_address("a" * 16) is None
    assert host_module.interface_address("ü" * 8) is None
    assert len(asked) == 1


def test_error_of_the_kernel_is_not_an_interface_without_address(monkeypatch):
    def ioctl(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(PermissionError):
        host_module.interface_address("eth0")


IPV6 = "20010db800000000000000000000000{number} 02 40 {scope} {flags} {name}\n"


@pytest.mark.parametrize(
    ("rows", "address"),
    [
        ([], None),
        ([("1", "00", "80", "eth0")], "2001:db8::1"),
        ([("1", "00", "80", "eth1")], None),
        ([("1", "20", "80", "eth0")], None),  # link-local
        ([("1", "00", "01", "eth0"), ("2", "00", "00", "eth0")], "2001:db8::2"),  # temporary
        ([("1", "00", "a0", "eth0")], None),  # deprecated
        ([("1", "00", "88", "eth0")], None),  # a duplicate
        ([("1", "00", "c0", "eth0")], None),  # not yet checked
        ([("1", "00", "80", "eth0"), ("2", "00", "80", "eth0")], "2001:db8::1"),
    ],
)
def test_ipv6_address_is_global_and_stays(tmp_path, monkeypatch, rows, address):
    table = tmp_path / "if_inet6"
    table.write_text(
        "".join(
            IPV6.format(number=number, scope=scope, flags=flags, name=name)
            for number, scope, flags, name in rows
        )
    )
    monkeypatch.setattr(host_module, "_IPV6_TABLE", table)
    assert host_module.interface_address("eth0", socket.AF_INET6) == address


def test_kernel_without_ipv6_has_no_ipv6_address(tmp_path, monkeypatch):
    monkeypatch.setattr(host_module, "_IPV6_TABLE", tmp_path / "none")
    assert host_module.interface_address("lo", socket.AF_INET6) is None

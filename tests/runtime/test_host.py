import os
import socket
import subprocess
import sys

import pytest

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

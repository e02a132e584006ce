"""A host whose sudo asks for a password: reported, and deployed with one from a file."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploys.fleet import queries
from deploys.fleet.pyinfra_process import Pyinfra
from lab.lab import Lab
from worker.errors import SettingsError

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PASSWORD = "correct horse"
INVENTORY = """
from lab.access import operator_access

access = {"ssh_hostname": "10.88.0.13", "ssh_user": "bob", "_sudo": True}
own = {"swarm_enabled": False, "slots": 1}
workers = [("h3", {**operator_access(), **access, **own, **CHANGES})]
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def host_with_bob(own_lab: Lab) -> Lab:
    own_lab.host(3).ssh(
        "id bob >/dev/null 2>&1 || useradd --create-home --shell /bin/bash bob;"
        " install -d -m 700 -o bob -g bob /home/bob/.ssh"
        " && install -m 600 -o bob -g bob /root/.ssh/authorized_keys /home/bob/.ssh/authorized_keys"
        f" && echo 'bob:{PASSWORD}' | chpasswd && echo 'bob ALL=(ALL) ALL' > /etc/sudoers.d/bob"
    )
    return own_lab


def inventory(folder: Path, **changes: Any) -> Path:
    file = folder / "bob.py"
    file.write_text(INVENTORY.replace("CHANGES", repr(changes)))
    return file


def run(lab: Lab, file: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return lab.operator("pyinfra", "-y", file, *words, timeout=60, check=False)


def test_password_that_sudo_asks_for_is_one_line_with_what_to_do(
    host_with_bob: Lab, tmp_path: Path
) -> None:
    file = inventory(tmp_path)
    done = run(host_with_bob, file, "exec", "--", "id", "-u")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "h3" in said
    assert (
        "sudo asks for the password of bob: write it into a file that only you can read and name"
        " that in" in said
    )
    assert "Traceback" not in said
    assert "sudo password:" not in said
    assert "the connection" not in said
    found = queries.look(Pyinfra(str(file), host_with_bob.network.inside()), ["h3"])
    assert found.reasons["h3"].startswith("sudo asks for the password of bob"), found.reasons


def test_password_in_a_file_makes_root_of_the_user_and_is_shown_nowhere(
    host_with_bob: Lab, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text(f"{PASSWORD}\n")
    file = inventory(tmp_path, _sudo_password_file=str(secret))
    done = run(host_with_bob, file, "-v", "exec", "--", "id", "-u")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "[h3] 0" in said
    assert PASSWORD not in said
    pyinfra = Pyinfra(str(file), host_with_bob.network.inside())
    found = queries.look(pyinfra, ["h3"])
    assert set(found.states) == {"h3"}, found.reasons
    assert PASSWORD not in repr(pyinfra.hosts(timeout=60))
    left = (
        host_with_bob.host(3)
        .ssh(f"ls /tmp | grep askpass; grep -rs '{PASSWORD}' /tmp /var/log; true")
        .stdout
    )
    assert left == ""


def test_wrong_password_is_named(host_with_bob: Lab, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong")
    done = run(
        host_with_bob, inventory(tmp_path, _sudo_password_file=str(secret)), "exec", "--", "id"
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert f"sudo does not accept the password of bob in {secret} (_sudo_password_file): " in said
    assert "Traceback" not in said


def test_sudo_that_asks_for_nothing_needs_no_file(host_with_bob: Lab, tmp_path: Path) -> None:
    host = host_with_bob.host(3)
    host.ssh("echo 'bob ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/bob")
    try:
        done = run(host_with_bob, inventory(tmp_path), "-v", "exec", "--", "id", "-u")
    finally:
        host.ssh("echo 'bob ALL=(ALL) ALL' > /etc/sudoers.d/bob")
    assert done.returncode == 0, done.stderr
    assert "[h3] 0" in done.stdout + done.stderr


def test_user_who_may_not_use_sudo_is_reported_in_sudos_words(
    host_with_bob: Lab, tmp_path: Path
) -> None:
    host = host_with_bob.host(3)
    (tmp_path / "password").write_text(PASSWORD)
    host.ssh("rm /etc/sudoers.d/bob")
    try:
        file = inventory(tmp_path, _sudo_password_file=str(tmp_path / "password"))
        done = run(host_with_bob, file, "exec", "--", "id")
    finally:
        host.ssh("echo 'bob ALL=(ALL) ALL' > /etc/sudoers.d/bob")
    assert done.returncode != 0
    assert "bob is not in the sudoers file" in done.stdout + done.stderr


def test_password_file_that_is_wrong_is_refused_before_a_host_is_connected_to(
    host_with_bob: Lab, tmp_path: Path
) -> None:
    pyinfra = Pyinfra(
        str(inventory(tmp_path, _sudo_password_file="/nowhere")), host_with_bob.network.inside()
    )
    with pytest.raises(SettingsError, match=r"h3: _sudo_password_file: /nowhere: No such file"):
        pyinfra.hosts(timeout=60, is_to_be_deployed=True)

"""A host's part of a backup arrives whole, in pieces, and leaves nothing behind."""

import base64
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nacl.public import PrivateKey

from deploys import backup_pack, backup_send

CONTENT = b"a tar that takes some pieces" * 100


class Host:
    """Runs commands in this machine's shell, without network facts."""

    def __init__(self) -> None:
        self.inputs: list[int] = []

    def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, Any]:
        stdin = "".join(arguments.get("_stdin", ()))
        if stdin:
            self.inputs.append(len(base64.b64decode(stdin)))
        done = subprocess.run(
            ["sh", "-c", command.get_raw_value()],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode == 0, done


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    key = PrivateKey.generate()
    monkeypatch.setattr(backup_send, "standard_input", lambda: bytes(key).hex())
    monkeypatch.setattr(backup_send, "PIECE", 1000)
    monkeypatch.setattr(backup_pack, "CHUNK", 300)
    monkeypatch.setattr(
        backup_send, "fact_cache", SimpleNamespace(arguments_of_facts=lambda host: {})
    )
    monkeypatch.setattr(backup_send, "print_host_combined_output", lambda host, output: None)
    file = tmp_path / "part"
    with file.open("wb") as stream:
        public = bytes(key.public_key).hex()
        sealer = backup_pack.Sealer(stream, f"{backup_pack.KEY_PREFIX}{public}")
        sealer.write(CONTENT)
        sealer.finish()
    return file


def test_part_is_put_together_on_the_host_and_removed(part: Path, tmp_path: Path) -> None:
    host, remote, got = Host(), tmp_path / "remote", tmp_path / "got"
    script = f"stat --format=%a {remote} {remote}/tar > {tmp_path}/modes; cp {remote}/tar {got}"
    assert backup_send._send(None, host, str(part), str(remote), script)  # type: ignore[arg-type]
    assert got.read_bytes() == CONTENT
    assert (tmp_path / "modes").read_text().split() == ["700", "600"]
    assert host.inputs == [1200, 1200, 400]
    assert not remote.exists()


def test_failure_leaves_nothing(part: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    assert not backup_send._send(None, Host(), str(part), str(remote), "exit 1")  # type: ignore[arg-type]
    assert not remote.exists()


def test_what_a_killed_restore_left_is_removed_by_the_next_one(part: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    left, kept = state / ".restore-killed", state / "worker-0"
    for folder in (left, kept):
        folder.mkdir(parents=True)
        (folder / "tar").write_bytes(CONTENT)
    remote = state / ".restore-new"
    assert backup_send._send(None, Host(), str(part), str(remote), "true")  # type: ignore[arg-type]
    assert [folder.name for folder in state.iterdir()] == ["worker-0"]


def test_restore_that_another_one_displaces_fails(part: Path, tmp_path: Path) -> None:
    remote = tmp_path / "state/.restore-first"

    class Displaced(Host):
        def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, Any]:
            if len(self.inputs) == 1:
                shutil.rmtree(remote, ignore_errors=True)
            return super().run_shell_command(command, **arguments)

    host, script = Displaced(), f"touch {tmp_path}/restored"
    assert not backup_send._send(None, host, str(part), str(remote), script)  # type: ignore[arg-type]
    assert not (tmp_path / "restored").exists()

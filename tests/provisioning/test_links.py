"""root in folders of the services' user must not follow links that this user put there."""

import base64
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploys import backup_pack, host_files, maintenance, worker
from deploys.facts import Identities
from deploys.fleet_facts import NodeReports
from deploys.paths import CONFIGURATION, STATE
from tests.provisioning.shell_host import ShellHost

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root could be led astray")

# In the place of hivewright's own, which this machine need not have.
USER = "daemon"
SECRET = "only root may know\n"


class Fixture:
    """A state folder with `slot`, which is USER's, and a file of root that USER wants to read."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.state, self.secret = folder / "state", folder / "secret"
        self.slot = self.state / "worker-0"
        self.slot.mkdir(parents=True)
        shutil.chown(self.slot, USER, USER)
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)

    def require_secret_is_kept(self) -> None:
        """Assert that the file is unchanged, and that USER can read its text nowhere."""
        found = self.secret.stat()
        assert (found.st_uid, found.st_mode & 0o777, self.secret.read_text()) == (0, 0o600, SECRET)
        theirs = [
            file for file in self.state.rglob("*") if file.is_file() and not file.is_symlink()
        ]
        assert [file for file in theirs if SECRET in file.read_text()] == []


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    for module in (worker, maintenance):
        monkeypatch.setattr(module, "USER", USER)
    with tempfile.TemporaryDirectory() as folder:
        yield Fixture(Path(folder))


def run(script: str, stdin: bytes = b"") -> None:
    done = subprocess.run(
        ["sh", "-c", script], input=stdin, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_only_identity_books_and_wallet_of_a_slot_are_kept(there: Fixture) -> None:
    kept_files = (
        "swarm.pem",
        "enrolment.json",
        "ledger.db",
        "model.json",
        "wallet/wallet.json",
        "wallet/journal.db",
    )
    for name in (*kept_files, "status.json", "checkpoints/round-3/model.safetensors"):
        file = there.slot / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    run(f"chown -R {USER} {there.slot}")
    for _ in range(2):
        run(worker.keep_identity_script(there.slot, there.state / "retired"))
    assert not there.slot.exists()
    (kept,) = (there.state / "retired").iterdir()
    assert kept.name.startswith("worker-0-")
    found = {
        str(file.relative_to(kept)): file.read_text() for file in kept.rglob("*") if file.is_file()
    }
    assert found == {name: name for name in kept_files}


def test_retired_slot_takes_no_file_of_roots_along(there: Fixture) -> None:
    (there.slot / "swarm.pem").write_text("KEY")
    (there.slot / "ledger.db").symlink_to(there.secret)
    run(worker.keep_identity_script(there.state / "worker-0", there.state / "retired"))
    (kept,) = (there.state / "retired").iterdir()
    assert (kept / "swarm.pem").read_text() == "KEY"
    assert (kept.owner(), kept.stat().st_mode & 0o777, kept.parent.owner()) == (USER, 0o700, "root")
    assert not there.slot.exists()
    there.require_secret_is_kept()


def test_key_is_not_written_through_a_link(there: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    (there.slot / "swarm.pem.new").symlink_to(there.secret)
    host = ShellHost()
    monkeypatch.setattr(host_files, "host", host)
    key = {
        "path": there.slot / "swarm.pem",
        "content": b"KEY",
        "user": USER,
        "group": USER,
        "mode": "600",
    }
    with pytest.raises(AssertionError, match=r"swarm\.pem\.new: Permission denied"):
        host.run(host_files.file._inner(**key))
    there.require_secret_is_kept()
    (there.slot / "swarm.pem.new").unlink()
    host.run(host_files.file._inner(**key))
    written = there.slot / "swarm.pem"
    assert (written.read_text(), written.owner(), written.stat().st_mode & 0o777) == (
        "KEY",
        USER,
        0o600,
    )


def test_backup_holds_no_file_of_roots(there: Fixture) -> None:
    (there.slot / "swarm.pem").symlink_to(there.secret)
    pack = (
        f"from deploys import backup_pack as b; b.become_user({USER!r});"
        f" b.pack(b.Path({str(there.state)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", pack], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"Too many levels of symbolic links: '{there.slot}/swarm.pem'" in done.stderr


def test_backup_of_a_slot_holds_no_key_of_its_sibling(there: Fixture) -> None:
    """The owner of a file proves nothing: all slots have one user."""
    sibling = there.state / "worker-1/swarm.pem"
    sibling.parent.mkdir()
    sibling.write_text("KEY")
    (there.slot / "swarm.pem").symlink_to(sibling)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        backup_pack.pack(there.state)


@pytest.mark.parametrize("name", ["status.json", "rounds.jsonl", "enrolment.json"])
def test_facts_read_no_file_of_roots(there: Fixture, name: str) -> None:
    there.secret.write_text(f'{{"peer_id": "{SECRET.strip()}", "finished_at": 17.5}}\n')
    configuration = there.state.parent / "etc"
    configuration.mkdir()
    (configuration / "worker-0.yaml").touch()
    (there.slot / name).symlink_to(there.secret)
    for fact in (NodeReports(), Identities()):
        script = (
            fact.command()
            .replace(str(STATE), str(there.state))
            .replace(str(CONFIGURATION), str(configuration))
        )
        said = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert "worker-0" in said or "worker@0" in said or name != "enrolment.json"
        assert SECRET.strip() not in said
        assert "17.5" not in said


def test_restore_gives_no_file_of_roots_away(there: Fixture) -> None:
    """Neither by an existing link, nor by one in the archive, nor by a name in it."""
    (there.slot / "ledger.db").symlink_to(there.secret)
    (there.state / "retired").mkdir()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        link = tarfile.TarInfo("retired/worker-1-20260101T000000/account.token")
        link.type, link.linkname = tarfile.SYMTYPE, str(there.secret)
        tar.addfile(link)
        for name, text in (
            ("worker-0/ledger.db", b"LEDGER"),
            ("keeper/owner.key", b"OWNER"),
            ("worker-1 ../x/y", b""),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o600
            tar.addfile(entry, io.BytesIO(text))
    run(maintenance.restore_script(there.state), base64.b64encode(stream.getvalue()))
    owner_key = there.state / "keeper/owner.key"
    assert (owner_key.read_text(), owner_key.owner(), owner_key.parent.owner()) == (
        "OWNER",
        USER,
        USER,
    )
    assert (there.state / "retired").owner() == "root"
    assert (there.slot / "ledger.db").is_symlink()
    assert not (there.state / "x").exists()
    there.require_secret_is_kept()


def test_keys_that_have_moved_are_set_aside_where_they_are(there: Fixture) -> None:
    vault = there.state.parent / "vault"
    vault.mkdir()
    for name in ("swarm.pem", "enrolment.json", "wallet/wallet.json"):
        (there.slot / name).parent.mkdir(exist_ok=True)
        (there.slot / name).write_text(name)
    (there.slot / "swarm.pem.moved").symlink_to(vault)
    (script,) = maintenance.retire._inner()
    run(
        f"chown -hR {USER} {there.slot}; systemctl() {{ :; }};"
        f" {script.replace(str(STATE), str(there.state))}"
    )
    assert list(vault.iterdir()) == []
    assert sorted(file.name for file in there.slot.iterdir()) == [
        "enrolment.json.moved",
        "swarm.pem.moved",
        "wallet.moved",
    ]
    assert (there.slot / "swarm.pem.moved").read_text() == "swarm.pem"

"""Models that slots share, on a real systemd: which unit may write where."""

import base64
import shlex
from pathlib import Path

import pytest

from deploys import units, worker
from deploys.inventory import validation
from deploys.inventory.host_plan import HostEntry
from deploys.paths import CURRENT, MODELS, STATE
from deploys.services import WORKER_UNIT
from lab.lab import Lab
from lab.lab_host import Host

pytestmark = [pytest.mark.lab, pytest.mark.slow]

DATA = {"slots": 2, "swarm_enabled": False, "model_name": "auto"}
# In the place of Python, which is to run `hivewright fetch`, or a worker that somebody has taken
# over.
TRIES = f"""#!/bin/sh
cat {STATE}/worker-0/model.json
cat {STATE}/worker-0/swarm.pem {STATE}/worker-1/swarm.pem && echo stolen
for folder in {MODELS} {MODELS.parent}/worker-0 {MODELS.parent}/worker-1 {STATE}/worker-0 $HOME; do
  touch $folder/tried && echo wrote in $folder
done
[ -z "$CREDENTIALS_DIRECTORY" ] || cat "$CREDENTIALS_DIRECTORY/model.token"
echo "$@" | grep -o 'token-file .*'
cat {MODELS}/whole && echo read the model
true
"""
INVENTORY = """
from lab.access import operator_access

own = {"ssh_hostname": "10.88.0.12", "ssh_user": "root"}
workers = [("h2", {**operator_access(), **own, **CHANGES})]
"""


@pytest.fixture
def host(own_lab: Lab) -> Host:
    host = own_lab.host(2)
    host.ssh(
        "id hivewright >/dev/null 2>&1 || useradd --system --no-create-home hivewright; mkdir -p"
        f" {CURRENT}/environment/bin /etc/hivewright; for n in 0 1; do install -d -o hivewright"
        f" {STATE}/worker-$n {MODELS.parent}/worker-$n; echo KEY > {STATE}/worker-$n/swarm.pem;"
        f" echo CHOICE > {STATE}/worker-$n/model.json; done; chown -R hivewright {STATE}/worker-*"
    )
    (host.root / str(CURRENT / "environment/bin/python").lstrip("/")).write_text(TRIES)
    host.ssh(f"chmod 755 {CURRENT}/environment/bin/python")
    return host


def test_only_fetch_writes_models_and_nobody_sees_a_key_but_his_own(host: Host) -> None:
    slot = validation.check([HostEntry("gpu-1", ("workers",), DATA)])["gpu-1"].slots[0]
    said = host.ssh(f"sh -euc {shlex.quote(worker.fetch_script(slot))} 2>/dev/null").stdout
    assert said.splitlines() == ["CHOICE", f"wrote in {MODELS}", "wrote in /tmp"]
    host.ssh(f"echo MODEL > {MODELS}/whole; chown hivewright {MODELS}/whole")

    said = host.ssh(f"sh -euc {shlex.quote(worker.examine_script(slot))} 2>/dev/null").stdout
    home = f"{MODELS.parent}/worker-0"
    wrote = [f"wrote in {folder}" for folder in (home, f"{STATE}/worker-0", home)]
    assert said.splitlines() == [
        "CHOICE",
        "KEY",
        *wrote,
        "MODEL",
        "read the model",
    ], "the doctor sees its slot alone"

    unit = units.render(WORKER_UNIT, 252, 900)
    unit = "\n".join(
        line
        for line in unit.splitlines()
        if not line.startswith(("Type=", "NotifyAccess=", "Watchdog"))
    )
    name = slot.unit
    for path, text in ((WORKER_UNIT, unit), (f"{name}.d/{units.DROP_IN}", slot.unit_settings())):
        file = host.root / "etc/systemd/system" / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    host.ssh(f"systemctl daemon-reload; systemctl start --wait {name}; true")
    said = host.ssh(f"journalctl --no-pager --quiet --output=cat --unit={name}").stdout
    assert [line for line in said.splitlines() if line.startswith("wrote in")] == wrote
    assert "read the model" in said
    assert f"cannot touch '{MODELS}/tried': Read-only file system" in said


def test_token_for_a_gated_model_is_seen_by_fetch_alone(host: Host, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    data = {**DATA, "model_token_file": str(tmp_path / "token")}
    slot = validation.check([HostEntry("gpu-1", ("workers",), data)])["gpu-1"].slots[0]
    token = base64.b64encode(b"hf_secret\n").decode()
    script = f"echo {token} | sh -euc {shlex.quote(worker.fetch_script(slot))} 2>/dev/null"
    said = host.ssh(script).stdout.splitlines()
    assert "hf_secret" in said
    assert [line for line in said if line.startswith("token-file /run/credentials/run-")]
    said = host.ssh(f"sh -euc {shlex.quote(worker.examine_script(slot))} 2>&1").stdout.splitlines()
    assert not [line for line in said if "hf_" in line or "token-file" in line]
    assert (
        "hf_secret"
        not in host.ssh("grep -rs hf_secret /run /etc/hivewright /etc/systemd; true").stdout
    )


@pytest.mark.parametrize("code", [0, 4])
def test_progress_and_failure_of_a_download_are_in_the_deploys_output(
    host: Host, own_lab: Lab, tmp_path: Path, code: int
) -> None:
    python = host.root / str(CURRENT / "environment/bin/python").lstrip("/")
    said = "downloading me/x: 1 of 2 MB, 3.0 MB/s"
    python.write_text(
        f'#!/bin/sh\necho "{said}" >&2; cat $CREDENTIALS_DIRECTORY/model.token | wc -c; exit'
        f" {code}\n"
    )
    (tmp_path / "token").write_text("hf_secret")
    data = {**DATA, "model_name": "me/x", "model_token_file": str(tmp_path / "token")}
    (tmp_path / "one.py").write_text(INVENTORY.replace("CHANGES", repr(data)))
    command = ("pyinfra", "-y", tmp_path / "one.py", "tests/provisioning/fetch_deploy.py")
    done = own_lab.operator(*command, timeout=60, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == (code != 0), output
    assert f"[h2] {said}" in output
    # The token with its line break.
    assert "[h2] 10" in output
    assert "hf_secret" not in output
    assert ("failed: h2 (Fetch the model of slot 0)" in output) == (code != 0)

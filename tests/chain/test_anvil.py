"""`hivewright chain up` and `hivewright chain deploy` on a real anvil.

They run as processes, or as functions in this one.
"""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from eth_account import Account

from tests import preloaded
from worker import settings
from worker.chain import deployment
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.embedded.snapshots import Snapshots
from worker.errors import ChainError, ChainUnreachable, ResourceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(place, tmp_path):
    """Start `hivewright chain up`, and end it after the block."""
    started = []

    def chain_up() -> subprocess.Popen:
        address = tmp_path / "chain/address"
        address.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "worker",
            "chain",
            "up",
            "--settings",
            tmp_path / "settings.yaml",
        ]
        with (tmp_path / "chain.log").open("a") as log:
            process = preloaded.Popen(
                command, "worker.chain.embedded.anvil", stdout=log, stderr=log
            )
        started.append(process)
        deadline = time.monotonic() + 90
        while not address.exists():
            assert process.poll() is None, (tmp_path / "chain.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield chain_up
    for process in started:
        process.kill()
        process.wait()


def children_of(process) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


# ---- chain up


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_state_survives_an_orderly_end(place, start, signum):
    process = start()
    deployed = anvil.deploy(place)
    Coordinator(place.chain).transact(
        anvil.load_owner(place.keeper), Coordinator(place.chain).update_stage_and_round(), 10
    )
    process.send_signal(signum)
    assert process.wait(20) == 0
    start()
    again = anvil.deploy(place)
    assert again.contract == deployed.contract
    client = Coordinator(place.chain)
    assert client.current_round() == 1
    assert [event.arguments for event in client.events("RoundAdvanced")] == [{"newRoundNumber": 1}]


def test_killed_parent_leaves_no_anvil(start):
    process = start()
    (child,) = children_of(process)
    process.kill()
    process.wait()
    wait_until_gone(child)


def test_killed_anvil_ends_the_role(start, tmp_path):
    process = start()
    (child,) = children_of(process)
    os.kill(child, signal.SIGKILL)
    assert process.wait(20) == 6
    assert "anvil ended by itself with code -9" in (tmp_path / "chain.log").read_text()


def test_port_in_use_is_named(place, rpc_url):
    port = int(rpc_url.rpartition(":")[2])
    taken = place.anvil.model_copy(update={"port": port})
    expected = (
        rf"port {port} \(anvil.port\): already in use on 127.0.0.1; free it or set another, 0 lets"
        r" the kernel choose"
    )
    with pytest.raises(ResourceError, match=expected), anvil.running(taken, 31337):
        pass


def test_missing_binary_is_named(place, tmp_path):
    section = place.anvil.model_copy(update={"binary": tmp_path / "anvil"})
    expected = (
        rf"no anvil at {tmp_path}/anvil \(anvil.binary\); `scripts/anvil FOLDER` installs it and"
        r" prints where"
    )
    with pytest.raises(ResourceError, match=expected), anvil.running(section, 31337):
        pass


def test_broken_state_file_is_named(place):
    place.anvil.state_file.parent.mkdir(parents=True)
    place.anvil.state_file.write_text("{broken")
    with (
        pytest.raises(ChainError, match="anvil ended with code"),
        anvil.running(place.anvil, 31337),
    ):
        pass


# ---- chain deploy


def test_deploy_twice_is_one_contract(chain, capsys):
    transactions = chain.coordinator.nonce(chain.owner.address)
    again = anvil.deploy(chain.settings)
    assert again == chain.deployment
    assert chain.coordinator.nonce(chain.owner.address) == transactions == 2
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    block = chain.coordinator.first_block()
    assert printed == {
        "rpc_url": again.rpc_url,
        "chain_id": 31337,
        "contract": again.contract,
        "contract_block": block,
    }
    assert json.loads(chain.settings.chain.deployment_file.read_text()) == printed


def test_owner_key_is_private_and_stays(chain):
    file = chain.settings.keeper.state_dir / "owner.key"
    before = file.read_text()
    anvil.deploy(chain.settings)
    assert file.read_text() == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert all(
        chain.coordinator.has_role(role, chain.owner.address)
        for role in ("OWNER_ROLE", "STAGE_MANAGER_ROLE")
    )


@pytest.mark.parametrize("transactions", [1, 2])
def test_deploy_that_was_cut_off_goes_on(place, rpc_url, monkeypatch, transactions):
    """Interrupted after the implementation, or after the proxy and before the file."""
    place = place.model_copy(update={"chain": place.chain.model_copy(update={"rpc_url": rpc_url})})
    sent = []
    transact = Coordinator.transact

    def cut_off(self, account, call, seconds):
        if len(sent) == transactions:
            raise KeyboardInterrupt
        sent.append(transact(self, account, call, seconds))
        return sent[-1]

    def no_file(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "transact", cut_off)
        anvil.load_owner(place.keeper, create=True)
        patch.setattr(anvil, "write_whole", no_file)
        with pytest.raises(KeyboardInterrupt):
            anvil.deploy(place)
    deployed = anvil.deploy(place)
    client = Coordinator(place.chain)
    client.check()
    assert client.nonce(anvil.load_owner(place.keeper).address) == 2
    assert sent[-1].contract == deployed.contract or transactions == 1


def test_chain_that_lost_its_state_is_named(chain, place, anvil_binary):
    """The settings are the same, and the chain starts from nothing."""
    with anvil.running(place.anvil, 31337) as (_, url):
        raw = chain.settings.chain.model_copy(update={"rpc_url": url})
        lost = chain.settings.model_copy(update={"chain": raw})
        with pytest.raises(ChainError) as caught:
            anvil.deploy(lost)
        file = chain.settings.keeper.state_dir / "deployment.json"
        assert (
            str(caught.value)
            == f"{file} names the contract {chain.deployment.contract}, and chain 31337 at {url}"
            " has none there: the chain lost its state, or is another one; restore the state"
            " (anvil.state_file), or move deployment.json away and deploy again: a new swarm"
            " from round 0"
        )
        file.unlink()
        assert anvil.deploy(lost).rpc_url == url


def test_deploy_follows_the_chain_to_another_port(place):
    with anvil.running(place.anvil, 31337) as (_, first):
        anvil._address_file(place.anvil).write_text(first)
        contract = anvil.deploy(place).contract
    with anvil.running(place.anvil, 31337) as (_, second):
        anvil._address_file(place.anvil).write_text(second)
        assert anvil.deploy(place).contract == contract
    assert deployment.resolve(place.chain).rpc_url == second


def test_deploy_with_a_contract_of_others_deploys_nothing(chain, place):
    update = {"rpc_url": chain.deployment.rpc_url, "contract": chain.deployment.contract}
    named = place.model_copy(update={"chain": place.chain.model_copy(update=update)})
    assert anvil.deploy(named) == chain.deployment
    assert not (place.keeper.state_dir / "owner.key").exists()


def test_deploy_on_another_chain_is_refused(place, rpc_url):
    other = place.model_copy(
        update={"chain": place.chain.model_copy(update={"rpc_url": rpc_url, "id": 5})}
    )
    with pytest.raises(ChainError, match=r"chain id 31337 answered by .* expected 5 \(chain.id\)"):
        anvil.deploy(other)


def test_deploy_without_a_chain_is_unreachable(place):
    with pytest.raises(
        ChainUnreachable, match=r"no chain.rpc_url, and no `hivewright chain up` has run here"
    ):
        anvil.deploy(place)


def test_used_owner_is_refused(chain):
    """After other transactions of the owner, the contract's address is not known."""
    chain.settings.chain.deployment_file.unlink()
    section = settings.Anvil(port=0, state_file=chain.settings.keeper.state_dir / "other.json")
    with anvil.running(section, 31337) as (_, url):
        moved = chain.settings.model_copy(
            update={"chain": chain.settings.chain.model_copy(update={"rpc_url": url})}
        )
        client = Coordinator(moved.chain.model_copy(update={"contract": chain.deployment.contract}))
        tx_hash, raw = client.sign(
            chain.owner, client.update_stage_and_round(), nonce=0, gas=100_000, gas_price_wei=0
        )
        client.send_raw(raw)
        client.wait_for_receipt(tx_hash, 10)
        with pytest.raises(
            ChainError, match=r"has sent other transactions on this chain; .* move its key away"
        ):
            anvil.deploy(moved)


# ---- scripts/anvil


def test_script_runs_again_without_npm(anvil_binary):
    """Once installed, the script needs neither npm nor the network."""
    printed = subprocess.run(
        [ROOT / "scripts/anvil", anvil_binary.parent],
        env={"PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert printed.stdout.strip() == str(anvil_binary)
    assert (
        "1.7.1"
        in subprocess.run(
            [anvil_binary, "--version"], capture_output=True, text=True, check=True
        ).stdout
    )


# ---- the state


def test_kill_at_any_moment_leaves_a_whole_state(place):
    """The chain is killed while it works; the next start has the state that was on disk."""
    client: Coordinator | None = None
    rng = random.Random(3)
    padding = bytes.fromhex("61800080600c6000396000f3") + rng.randbytes(0x8000).replace(
        b"\xef", b"\0"
    )
    for round in range(3):
        with anvil.running(place.anvil, 31337) as (process, url):
            anvil._address_file(place.anvil).write_text(url)
            anvil.deploy(place)
            owner, client = anvil.load_owner(place.keeper), Coordinator(place.chain)
            assert client.current_round() >= round
            while client.current_round() <= round:
                client.transact(owner, client.advance_round(client.current_round()), 10)
            wait_for_snapshot(place)
            large = Account.create()
            for nonce in range(40):
                call = Call("padding", padding, None)
                _, raw = client.sign(large, call, nonce=nonce, gas=30_000_000, gas_price_wei=0)
                client.send_raw(raw)
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
        json.loads(place.anvil.state_file.read_text())
    assert list(place.anvil.state_file.parent.glob(".state.json.*")) == []


@pytest.mark.parametrize(
    ("draft", "seconds_later", "found"),
    [
        ('{"block":{"number":"0x2"}}', 1, '{"block":{"number":"0x2"}}'),
        ('{"block":{"number":"0x2"}', 1, "{}"),  # cut short
        ("", 1, "{}"),
        ('{"block":{"number":"0x2"}}', -1, "{}"),  # a backup was put back since
    ],
)
def test_dump_that_was_left_behind_is_used_if_it_is_whole_and_newer(
    tmp_path, draft, seconds_later, found
):
    """As after kill -9 of `chain up` itself, when anvil dumps once more while it ends."""
    file = tmp_path / "state.json"
    file.write_text("{}")
    snapshots = Snapshots(file)
    snapshots.draft.write_text(draft)
    moment = file.stat().st_mtime + seconds_later
    os.utime(snapshots.draft, (moment, moment))
    snapshots.start()
    snapshots.stop()
    assert (file.read_text(), snapshots.draft.exists()) == (found, False)


def test_first_dump_becomes_the_state(tmp_path):
    snapshots = Snapshots(tmp_path / "new/state.json")
    snapshots.start()
    snapshots.draft.write_text("{}")
    snapshots.stop()
    assert (tmp_path / "new/state.json").read_text() == "{}"


def wait_for_snapshot(place) -> None:
    """Wait for a snapshot that was begun after this call."""
    for _ in range(2):
        before = place.anvil.state_file.stat().st_ino if place.anvil.state_file.exists() else None
        deadline = time.monotonic() + 30
        while not place.anvil.state_file.exists() or place.anvil.state_file.stat().st_ino == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ---- the watchdog


def ask_raw(url: str, method: str, params: list, seconds: float = 5.0) -> object:
    asked = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return requests.post(url, json=asked, timeout=seconds).json().get("result")


def test_chain_that_mines_nothing_is_restarted_within_a_minute(start, tmp_path):
    """Endless code in one request stops mining, but not answers to eth_blockNumber."""
    process = start()
    url = (tmp_path / "chain/address").read_text().strip()
    (before,) = children_of(process)
    loop = {"data": "0x5b600056", "gas": "0xffffffffffff"}
    with pytest.raises(requests.Timeout):
        ask_raw(raw_url(process), "eth_call", [loop, "latest"], 1.0)
    account = Account.create()
    plain = {
        "chainId": 31337,
        "nonce": 0,
        "gas": 100_000,
        "gasPrice": 0,
        "value": 0,
        "to": account.address,
    }
    raw = account.sign_transaction(plain).raw_transaction
    assert ask_raw(raw_url(process), "eth_sendRawTransaction", ["0x" + bytes(raw).hex()])
    time.sleep(0.5)
    assert ask_raw(raw_url(process), "eth_blockNumber", []) == "0x0"
    began = time.monotonic()
    while children_of(process) in ([before], []):
        assert time.monotonic() - began < 60, (tmp_path / "chain.log").read_text()
        time.sleep(0.2)
    while True:
        try:
            if ask_raw(url, "eth_getBalance", ["0x" + "00" * 20, "latest"], 2.0) == "0x0":
                break
        except requests.RequestException:
            assert time.monotonic() - began < 60, (tmp_path / "chain.log").read_text()
        time.sleep(0.2)
    assert process.poll() is None
    assert "chain hangs, killing it" in (tmp_path / "chain.log").read_text()


def raw_url(process) -> str:
    """Return the URL of anvil itself."""
    (child,) = children_of(process)
    words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
    return f"http://127.0.0.1:{words[words.index('--port') + 1]}"

"""The keeper on a real chain; as processes for signals, restarts and concurrency."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from web3 import Web3

from tests import preloaded
from worker import settings
from worker.chain import contract
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.keeper import Keeper, needed, verdict
from worker.errors import ChainError, ContractRefused

ROOT = Path(__file__).resolve().parents[2]
NODE_A, NODE_B, NODE_C = (f"/ip4/127.0.0.1/tcp/{port}/p2p/QmBoot" for port in (1, 2, 3))


def with_keeper(chain, **values) -> settings.Settings:
    """Return the chain's settings with these keeper settings, in the folder of the owner's key."""
    keeper = chain.settings.keeper.model_copy(update={"poll_seconds": 0.05, **values})
    return chain.settings.model_copy(update={"keeper": keeper})


def report(chain, account, round: int, *peers: str) -> None:
    for peer in peers:
        chain.send(account, chain.coordinator.submit_reward(round, 0, 100, peer))


def grant_role(chain, role: str, address: str) -> Call:
    abi = Web3().eth.contract(abi=contract.coordinator_abi())
    data = abi.encode_abi("grantRole(bytes32,address)", [Web3.keccak(text=role), address])
    return Call("grantRole", bytes.fromhex(data[2:]), chain.deployment.contract)


def status_of(chain) -> dict:
    return json.loads((chain.settings.keeper.state_dir / "status.json").read_text())


# ---- when a round ends


@pytest.mark.parametrize(
    ("reporters", "expected", "is_populated", "seconds", "values", "wanted"),
    [
        ("", "", True, 1, {}, None),
        ("a", "", True, 1, {}, "ready"),
        ("a", "ab", True, 1, {}, None),
        ("ab", "ab", True, 1, {}, "ready"),
        ("b", "a", True, 1, {}, None),  # a new peer does not stand in for an expected one
        ("bc", "abc", True, 1, {"ready_fraction": 0.6}, "ready"),
        ("b", "abc", True, 1, {"ready_fraction": 0.6}, None),
        ("abc", "abcdefghijklmnopqrstuvwxyzABCD", True, 1, {"ready_fraction": 0.1}, "ready"),
        ("ab", "ab", True, 1, {"min_peers": 3}, None),
        ("abc", "ab", True, 1, {"min_peers": 3}, "ready"),
        ("ab", "ab", False, 1000, {}, None),  # too few registered: not even when the time is up
        ("", "ab", True, 600, {}, "time"),
        ("", "", True, 600, {}, "time"),
        ("ab", "ab", True, 4, {"min_round_seconds": 5.0}, None),
        ("ab", "ab", True, 5, {"min_round_seconds": 5.0}, "ready"),
    ],
)
def test_verdict(reporters, expected, is_populated, seconds, values, wanted):
    found = verdict(set(reporters), set(expected), is_populated, seconds, settings.Keeper(**values))
    assert found == wanted


@pytest.mark.parametrize(
    ("fraction", "num_expected", "wanted"),
    [(0.07, 100, 7), (0.1, 30, 3), (0.6, 3, 2), (1.0, 5, 5), (0.5, 0, 0)],
)
def test_needed_reports_are_rounded_up_and_no_product_is_rounded_up_for_its_last_bit(
    fraction, num_expected, wanted
):
    keeper = settings.Keeper(ready_fraction=fraction)
    assert needed({str(number) for number in range(num_expected)}, keeper) == wanted


def test_round_ends_when_all_of_the_last_two_rounds_have_reported(chain, caplog):
    caplog.set_level(logging.INFO)
    account = chain.new_account("a", "b", "c")
    keeper = Keeper(with_keeper(chain, min_peers=3))
    rounds = []
    for peer in ("a", "b", "c"):
        keeper.look()
        rounds.append(chain.coordinator.current_round())
        report(chain, account, 0, peer)
    keeper.look()
    assert (rounds, chain.coordinator.current_round()) == ([0, 0, 0], 1)
    # c is gone now: two rounds wait for it, the third does not.
    keeper = Keeper(with_keeper(chain, min_peers=1, round_seconds=1000.0))
    for round in (1, 2):
        report(chain, account, round, "a", "b")
        keeper.look()
        assert chain.coordinator.current_round() == round
        assert status_of(chain)["reporters"] == 2
        assert status_of(chain)["expected"] == 3
        chain.advance()
    report(chain, account, 3, "a", "b")
    keeper.look()
    assert chain.coordinator.current_round() == 4
    line = "round advanced round=0 reporters=3 expected=0 seconds="
    assert [
        record
        for record in caplog.messages
        if record.startswith(line) and record.endswith("reason=ready")
    ]


def test_late_report_makes_a_peer_expected(chain):
    account = chain.new_account("a", "b")
    keeper = Keeper(with_keeper(chain))
    report(chain, account, 0, "a")
    keeper.look()
    report(chain, account, 1, "a")
    report(chain, account, 0, "b")
    keeper.look()
    assert chain.coordinator.current_round() == 1
    report(chain, account, 1, "b")
    keeper.look()
    assert chain.coordinator.current_round() == 2


def test_round_does_not_end_before_min_peers_are_registered(chain):
    account = chain.new_account("a")
    report(chain, account, 0, "a")
    keeper = Keeper(with_keeper(chain, min_peers=2, round_seconds=0.001))
    keeper.look()
    assert (chain.coordinator.current_round(), status_of(chain)["state"]) == (
        0,
        "waiting-for-peers",
    )
    chain.send(account, chain.coordinator.register_peer("b"))
    keeper.look()
    assert (chain.coordinator.current_round(), status_of(chain)["state"]) == (1, "round-open")


def test_beginning_of_a_round_is_read_from_the_chain(chain):
    """A restart of the keeper does not extend the round."""
    chain.new_account("a")
    chain.advance()
    chain.advance()
    (event,) = chain.coordinator.events("RoundAdvanced", {"newRoundNumber": 2})
    Keeper(with_keeper(chain)).look()
    assert status_of(chain)["began_at"] == chain.coordinator.block_time(event.block)
    time.sleep(2.1)
    Keeper(with_keeper(chain, round_seconds=2.0)).look()
    assert chain.coordinator.current_round() == 3


def test_beginning_of_round_0_is_the_contract_s(chain):
    (event,) = chain.coordinator.events("Initialized")
    Keeper(with_keeper(chain, min_peers=9)).look()
    assert status_of(chain) == {
        "state": "waiting-for-peers",
        "round": 0,
        "reporters": 0,
        "expected": 0,
        "began_at": chain.coordinator.block_time(event.block),
        "limit_seconds": 600.0,
        "problem": None,
    }


# ---- never twice


def test_two_keepers_that_see_the_same_end_it_once(chain):
    chain.new_account("a")
    keepers = [Keeper(with_keeper(chain)) for _ in range(2)]
    for keeper in keepers:
        keeper.look()
    assert [keeper._advance(0) for keeper in keepers] == [True, False]
    assert chain.coordinator.current_round() == 1


def test_transaction_that_is_behind_the_round_is_refused_by_the_chain(chain):
    """The round may end between the poll and the transaction, and the latter decides."""
    call = chain.coordinator.advance_round(0)
    nonce = chain.coordinator.nonce(chain.owner.address)
    hashes = []
    for offset in range(2):
        tx_hash, raw = chain.coordinator.sign(
            chain.owner, call, nonce=nonce + offset, gas=200_000, gas_price_wei=0
        )
        chain.coordinator.send_raw(raw)
        hashes.append(tx_hash)
    receipts = [chain.coordinator.wait_for_receipt(tx_hash, 10) for tx_hash in hashes]
    assert [receipt.succeeded for receipt in receipts] == [True, False]
    assert chain.coordinator.current_round() == 1


def test_keeper_without_the_role_stops(chain, tmp_path):
    chain.new_account("a")
    values = with_keeper(chain, round_seconds=0.001, state_dir=tmp_path / "outsider")
    anvil.load_owner(values.keeper, create=True)
    with pytest.raises(
        ContractRefused, match="OnlyStageManager; the sending account lacks STAGE_MANAGER_ROLE"
    ):
        Keeper(values).look()


def test_keeper_without_a_key_stops(chain, tmp_path):
    with pytest.raises(
        ChainError, match=r"owner.key: no owner key; `hivewright chain deploy` makes it"
    ):
        Keeper(with_keeper(chain, state_dir=tmp_path / "empty"))


# ---- bootnodes


def test_bootnodes_are_published_and_withdrawn(chain):
    Keeper(with_keeper(chain, publish_bootnodes=(NODE_A, NODE_B, NODE_A))).look()
    assert chain.coordinator.bootnodes() == [NODE_A, NODE_B]
    Keeper(with_keeper(chain, publish_bootnodes=(NODE_B, NODE_C))).look()
    assert sorted(chain.coordinator.bootnodes()) == [NODE_B, NODE_C]
    Keeper(with_keeper(chain, publish_bootnodes=())).look()
    assert chain.coordinator.bootnodes() == []


def test_bootnodes_of_others_stay(chain):
    chain.send(chain.owner, chain.coordinator.add_bootnodes([NODE_C]))
    Keeper(with_keeper(chain, publish_bootnodes=(NODE_A,))).look()
    Keeper(with_keeper(chain)).look()
    assert chain.coordinator.bootnodes() == [NODE_C]


def test_bootnode_file_is_published_once_it_is_there_and_followed(chain, tmp_path):
    file = tmp_path / "multiaddr"
    keeper = Keeper(with_keeper(chain, bootnode_file=file, publish_bootnodes=(NODE_A,)))
    for text, wanted in (
        (None, [NODE_A]),
        (f"{NODE_B}\n", [NODE_A, NODE_B]),
        (f"{NODE_C}\n{NODE_B}\n", [NODE_A, NODE_B, NODE_C]),
        (f"{NODE_C}\n", [NODE_A, NODE_C]),
    ):
        if text:
            file.write_text(text)
        keeper.look()
        assert sorted(chain.coordinator.bootnodes()) == wanted


def test_bootnodes_cleared_by_somebody_are_published_again_with_the_next_round(chain):
    account = chain.new_account("a")
    keeper = Keeper(with_keeper(chain, publish_bootnodes=(NODE_A,)))
    keeper.look()
    chain.send(chain.owner, chain.coordinator.remove_bootnode(0))
    report(chain, account, 0, "a")
    keeper.look()
    keeper.look()
    assert chain.coordinator.bootnodes() == [NODE_A]


# ---- as a process


@pytest.fixture
def start(tmp_path):
    """Start `hivewright keeper` with the settings and a log file; end it after the test."""
    started = []

    def keeper(values: settings.Settings, name: str = "keeper") -> subprocess.Popen:
        file = tmp_path / f"{name}.yaml"
        file.write_text(settings.dump(values))
        with (tmp_path / f"{name}.log").open("a") as log:
            command = [sys.executable, "-m", "worker", "keeper", "--settings", file]
            started.append(preloaded.Popen(command, "worker.chain.keeper", stdout=log, stderr=log))
        return started[-1]

    yield keeper
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_0(chain, start, signum):
    process = start(with_keeper(chain))
    wait_for((chain.settings.keeper.state_dir / "status.json").exists)
    process.send_signal(signum)
    assert process.wait(10) == 0
    assert status_of(chain)["state"] == "stopped"


def test_second_keeper_in_one_folder_is_refused(chain, start, tmp_path):
    first = start(with_keeper(chain), "first")
    wait_for((chain.settings.keeper.state_dir / "status.json").exists)
    assert start(with_keeper(chain), "second").wait(60) == 4
    assert (
        f"(keeper.state_dir): in use by process {first.pid}"
        in (tmp_path / "second.log").read_text()
    )
    assert first.poll() is None
    assert status_of(chain)["state"] != "stopped"


def test_two_processes_end_every_round_once(chain, start, tmp_path):
    """Nonces do not help against a keeper with another key.

    Both see a round's end within milliseconds; one that is ended twice would be short.
    """
    chain.new_account("a")
    first = with_keeper(chain, round_seconds=2.0)
    second = with_keeper(chain, round_seconds=2.0, state_dir=tmp_path / "second")
    other = anvil.load_owner(second.keeper, create=True)
    chain.send(chain.owner, grant_role(chain, "STAGE_MANAGER_ROLE", other.address))
    start(first, "first")
    start(second, "second")
    wait_for(lambda: chain.coordinator.current_round() >= 4)
    events = list(chain.coordinator.events("RoundAdvanced"))
    assert [event.arguments["newRoundNumber"] for event in events] == list(
        range(1, len(events) + 1)
    )
    times = [chain.coordinator.block_time(event.block) for event in events]
    # Block times are whole seconds.
    assert all(later - earlier >= 1.9 for earlier, later in pairwise(times[1:])), times


def test_keeper_killed_again_and_again_ends_every_round_once(chain, start):
    chain.new_account("a")
    values = with_keeper(chain, round_seconds=1.0, publish_bootnodes=(NODE_A,))
    for _ in range(3):
        process, seen = start(values), chain.coordinator.current_round()
        wait_for(lambda seen=seen: chain.coordinator.current_round() > seen)
        process.kill()
        process.wait()
    events = list(chain.coordinator.events("RoundAdvanced"))
    assert [event.arguments["newRoundNumber"] for event in events] == list(
        range(1, len(events) + 1)
    )
    times = [chain.coordinator.block_time(event.block) for event in events]
    assert all(later - earlier >= 0.9 for earlier, later in pairwise(times)), (
        times
    )  # block times are whole seconds
    assert chain.coordinator.bootnodes() == [NODE_A]


def test_chain_that_comes_back_is_kept_on(tmp_path, anvil_binary, start):
    """The chain starts after the keeper, is killed for a while, and comes back with its state."""
    raw = {
        "anvil": {
            "port": 0,
            "state_file": str(tmp_path / "chain/state.json"),
            "binary": str(anvil_binary),
        },
        "keeper": {
            "state_dir": str(tmp_path / "keeper"),
            "poll_seconds": 0.05,
            "round_seconds": 1.0,
        },
        "chain": {
            "deployment_file": str(tmp_path / "keeper/deployment.json"),
            "timeout_seconds": 2.0,
        },
    }
    values = settings.parse(raw, "test")
    anvil.load_owner(values.keeper, create=True)
    process = start(values)
    log = tmp_path / "keeper.log"
    wait_for(lambda: "chain unreachable" in log.read_text())
    with anvil.running(values.anvil, 31337) as (_, url):
        anvil._address_file(values.anvil).write_text(url)
        anvil.deploy(values)
        client = Coordinator(values.chain)
        client.transact(anvil.load_owner(values.keeper), client.register_peer("a"), 10)
        wait_for(lambda: client.current_round() >= 1)
        seen = client.current_round()
    wait_for(lambda: log.read_text().count("chain unreachable") == 2)
    with anvil.running(values.anvil, 31337) as (running, url):
        anvil._address_file(values.anvil).write_text(url)
        anvil.deploy(values)  # another port: the deployment file follows, and so does the keeper
        client = Coordinator(values.chain)
        wait_for(lambda: client.current_round() > seen)
        os.kill(running.pid, signal.SIGKILL)
        wait_for(lambda: log.read_text().count("chain unreachable") == 3)
    assert process.poll() is None
    fixed = values.anvil.model_copy(update={"port": int(url.rpartition(":")[2])})
    with anvil.running(fixed, 31337):
        wait_for(lambda: client.current_round() > seen)
        seen = client.current_round()
        wait_for(lambda: client.current_round() > seen)
        process.terminate()
        assert process.wait(10) == 0
    assert log.read_text().count("chain unreachable") == 3, log.read_text()
    assert "Traceback" not in log.read_text()

"""Load and fault tests on a real anvil: is every reward recorded exactly once, and how fast?

    python -m benchmarks.chain [--only load accounts simultaneous kills faults] [--scale 1.0]
                               [--seconds S] [--json FILE]

    load          200 nodes submit a reward and a vote each through one account service, a process
                  of its own, over HTTP
    accounts      the same with an account for every four nodes
    simultaneous  64 submitters of one account at the same instant, 100 times, compared with each
                  of them reading the nonce itself
    kills         a node's ledger and settlement, ended with kill -9 at 500 random points
    faults        10,000 records with bad networks between node and account service, node and
              chain, service and chain: dropped, late, doubled and mixed-up answers, HTTP 500,
              answers of another chain, and one address that always leads to another chain

`--scale` makes all of them smaller; with `--seconds` the last two end early, with as many lives and
records as the time allows. The last three fail if one reward is lost, doubled or wrong.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from benchmarks.chain_stage import (
    PATIENCE_SECONDS,
    Stage,
    account_service,
    assert_exactly_once,
    client,
    node_chain,
    peer_names,
    stage,
    wait_until,
)
from benchmarks.faults import at_random, faulty
from worker import log, settings
from worker.account.accounts import Accounts
from worker.account.vault import load_account
from worker.chain.account_client import AccountClient
from worker.chain.client import Call, NonceUsed
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.ledger import Ledger
from worker.chain.settlement import Settlement
from worker.chain.transaction_queue import Sender
from worker.runtime.files import write_whole

FAULTS_OF_SERVICE = ("drop", "lose", "error", "twice", "late")
FAULTS_OF_CHAIN = (*FAULTS_OF_SERVICE, "stale", "elsewhere")
FAULT_SHARE = 0.05
VOTE_EVERY = 10
"""In the run with faults, one record in this many has a vote."""
_NODES_OF_ONE = 4
"""Nodes that share an account, in the run with many accounts."""
_PASSPHRASE = "of a benchmark"  # noqa: S105 - protects nothing
AT_A_TIME = 50
"""Records of a node that may wait in its ledger at a time, in the run with faults."""


@dataclass(frozen=True)
class Result:
    claim: str
    ours: float
    reference: float
    ratio: float
    unit: str


def load(scale: float, seconds: float = math.inf) -> list[Result]:
    """Let every node submit at once, and stop when the chain has all rewards and votes."""
    nodes = max(4, int(200 * scale))
    with stage() as on, account_service(on) as (url, account):
        peers = peer_names(nodes)
        on.register(account, peers)
        clients = [client(on, url, peer, timeout_seconds=30.0) for peer in peers]
        seconds = _submit_at_once(on, peers, clients)
    print(f"load: {nodes} nodes, reward and vote, in {seconds:.2f} s", flush=True)
    return [_result_of_load(f"{nodes} nodes: reward and vote on the chain", nodes, seconds)]


def accounts(scale: float, seconds: float = math.inf) -> list[Result]:
    """Do the same with an account for every four nodes, each of which has its own queue."""
    nodes = max(4, int(200 * scale))
    peers = peer_names(nodes)
    with stage() as on:
        folder = on.settings.account.state_dir
        passphrase = folder / "passphrase"
        write_whole(passphrase, _PASSPHRASE, mode=0o600)
        people = Accounts(folder, load_account(folder), "hivewright", _PASSPHRASE)
        tokens = []
        for first in range(0, nodes, _NODES_OF_ONE):
            person = people.create(f"{first}@example.org", _NODES_OF_ONE)
            own = peers[first : first + _NODES_OF_ONE]
            tokens += [people.link(person, peer) for peer in own]
            on.register(people.key_of(person), own)
        people.close()
        section = on.settings.account.model_copy(update={"passphrase_file": passphrase})
        hosted = replace(on, settings=on.settings.model_copy(update={"account": section}))
        with account_service(hosted) as (url, _):
            clients = []
            for peer, token in zip(peers, tokens, strict=True):
                write_whole(on.folder / f"{peer}/account.token", f"{token}\n", durable=False)
                chain = node_chain(on, url).model_copy(update={"timeout_seconds": 30.0})
                clients.append(AccountClient(chain, on.folder / peer))
            seconds = _submit_at_once(on, peers, clients)
    num_accounts = math.ceil(nodes / _NODES_OF_ONE)
    claim = f"{nodes} nodes of {num_accounts} accounts: reward and vote on the chain"
    print(f"accounts: {claim} in {seconds:.2f} s", flush=True)
    return [_result_of_load(claim, nodes, seconds)]


def _submit_at_once(on: Stage, peers: Sequence[str], clients: Sequence[AccountClient]) -> float:
    """Submit a reward and a vote of each peer, and return the seconds until all are recorded."""
    start = threading.Barrier(len(peers) + 1)

    def submit(number: int) -> None:
        peer = peers[number]
        clients[number].swarm()  # the connection is there, as a running node's is
        start.wait(PATIENCE_SECONDS)
        clients[number].submit_reward(0, 0, number, peer)
        clients[number].submit_winner(0, [peers[number - 1]], peer)

    with ThreadPoolExecutor(len(peers)) as threads:
        done = [threads.submit(submit, number) for number in range(len(peers))]
        start.wait(PATIENCE_SECONDS)
        started = time.monotonic()
        for future in done:
            future.result(PATIENCE_SECONDS)
    wait_until(lambda: _num_events(on, "WinnerSubmitted") == len(peers), "votes")
    wait_until(lambda: on.coordinator.total_rewards(peers) == list(range(len(peers))), "rewards")
    return time.monotonic() - started


def _result_of_load(claim: str, nodes: int, seconds: float) -> Result:
    limit = 6.0 * nodes / 200
    return Result(claim, round(seconds, 2), limit, round(limit / seconds, 2), "s")


def simultaneous(scale: float, seconds: float = math.inf) -> list[Result]:
    """Compare one Sender with submitters that each read the nonce, as RL Swarm's nodes do.

    The latter run a tenth as often.
    """
    times, width = max(2, int(100 * scale)), 64
    with stage() as on:
        account, peers = Account.create(), peer_names(width)
        on.register(account, peers)
        with closing(Sender(on.coordinator, account, on.folder / "queue.db")) as sender:
            base = on.coordinator.nonce(account.address)
            hashes: set[str] = set()
            for number in range(times):
                hashes |= set(
                    _at_once(width, lambda i, r=number: sender.send(_reward(on, r, peers[i])))
                )
                wait_until(lambda: sender.tend() == 0, "transactions")
                on.advance(1)
        accepted = sum(on.coordinator.total_rewards(peers))
        used = on.coordinator.nonce(account.address) - base
        assert accepted == used == len(hashes) == times * width, (accepted, used, len(hashes))

        rivals = peer_names(2 * width)[width:]
        rival = Account.create()
        on.register(rival, rivals)
        tries = min(10, times)
        for number in range(tries):
            _at_once(width, lambda i, r=number: _send_alone(on, rival, r, rivals[i]))
        time.sleep(6.0)  # no longer: a transaction after a gap in the nonces waits forever
        theirs = sum(on.coordinator.total_rewards(rivals))
    ours_share, their_share = accepted / (times * width), theirs / (tries * width)
    print(
        f"simultaneous: {accepted} of {times * width}; nonces read by each: {theirs} of"
        f" {tries * width}",
        flush=True,
    )
    claim = f"{width} submitters of one account at once, {times} times: share credited"
    return [
        Result(
            claim,
            ours_share,
            round(their_share, 4),
            round(ours_share / max(their_share, 1e-9), 2),
            "of 1",
        )
    ]


def _reward(on: Stage, round: int, peer: str) -> Call:
    return on.coordinator.submit_reward(round, 0, 1, peer)


def _send_alone(on: Stage, account: LocalAccount, round: int, peer: str) -> str:
    try:
        return on.coordinator.sign_and_send(account, _reward(on, round, peer))
    except NonceUsed:
        return ""


def _at_once(count: int, work: Callable[[int], str]) -> list[str]:
    barrier = threading.Barrier(count)

    def begin(number: int) -> str:
        barrier.wait(PATIENCE_SECONDS)
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count), timeout=PATIENCE_SECONDS))


def kills(scale: float, seconds: float = math.inf) -> list[Result]:
    """Kill one node's ledger and settlement again and again; each life continues the last."""
    lives, deadline = 0, time.monotonic() + seconds
    rng = random.Random(0)
    (peer,) = peer_names(1)
    with stage() as on, account_service(on) as (url, account):
        on.register(account, [peer])
        client(on, url, peer).close()
        folder = on.folder / "nodes" / peer
        found: Counter[str] = Counter()
        told = 0
        while lives < max(5, int(500 * scale)) and time.monotonic() < deadline:
            lives += 1
            # A round more than any life before may have recorded without having told us.
            on.advance(max(0, told + 40 - on.coordinator.current_round()))
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _live(node_chain(on, url), folder, peer, writer)
            os.close(writer)
            with os.fdopen(reader) as stream:
                assert stream.readline(), "the life ended by itself"
                time.sleep(rng.uniform(0, 0.8))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                for line in stream.read().splitlines():
                    if line.isdecimal():
                        told = max(told, int(line))
            with closing(Ledger(folder / "ledger.db")) as ledger:
                rows = ledger.rows()
                assert len(rows) >= told, f"{told} rounds were said to be recorded, {len(rows)} are"
                found.update(
                    {state for row in rows[-8:] for state in (row.reward_state, row.vote_state)}
                )
        on.advance(max(0, len(rows) - on.coordinator.current_round()))
        _settle_rest(node_chain(on, url), folder, 1200.0)
        num_rows = assert_exactly_once(on, [peer])
    print(
        f"kills: {lives} lives, {num_rows} rewards and votes, kills that met newest rows in state:"
        f" {dict(found)}",
        flush=True,
    )
    return [
        Result(f"kill -9 at {lives} points: rewards and votes credited once", 1.0, 1.0, 1.0, "of 1")
    ]


def _live(chain: settings.Chain, folder: Path, peer: str, writer: int) -> None:
    """Record and settle rounds in a process, and report each round once `record` has returned."""
    ledger = Ledger(folder / "ledger.db")
    settling = Settlement(
        ledger,
        Coordinator(settings.chain_of_node(chain, folder)),
        AccountClient(chain, folder),
        chain,
    )
    os.write(writer, b"begun\n")
    settling.start()
    begin = len(ledger.rows())
    for round in range(begin, begin + 30):
        ledger.record(round, 0, peer, round % 1000, ["QmWinner"], secrets.token_hex(32))
        os.write(writer, f"{round + 1}\n".encode())
        settling.wake()
        time.sleep(random.uniform(0, 0.4))
    time.sleep(PATIENCE_SECONDS)
    os._exit(0)


def _settle_rest(chain: settings.Chain, folder: Path, seconds: float = PATIENCE_SECONDS) -> None:
    with closing(Ledger(folder / "ledger.db")) as ledger:
        settling = Settlement(
            ledger,
            Coordinator(settings.chain_of_node(chain, folder)),
            AccountClient(chain, folder),
            chain,
        )
        settling.start()
        try:
            assert settling.flush(seconds), (settling.status(), ledger.unsettled()[:3])
        finally:
            settling.close()


def faults(scale: float, seconds: float = math.inf) -> list[Result]:
    """Run nodes in several processes, with faults in FAULT_SHARE of all requests on all ways."""
    num_processes, per_process = 2 if scale > 0.1 else 1, 8
    per_node = max(2, int(10_000 * scale / (num_processes * per_process)))
    peers = peer_names(num_processes * per_process)
    with ExitStack() as stack:
        on = stack.enter_context(stage())
        other = settings.Anvil(port=0, state_file=on.folder / "other/state.json")
        _, wrong_url = stack.enter_context(anvil.running(other, 5))
        chain_fault = at_random(1, FAULT_SHARE, FAULTS_OF_CHAIN)
        behind = stack.enter_context(faulty(on.rpc_url, chain_fault))
        url, account = stack.enter_context(account_service(on, [wrong_url, behind.url]))
        on.register(account, peers)
        on.advance(per_node)
        front = stack.enter_context(faulty(url, at_random(2, FAULT_SHARE, FAULTS_OF_SERVICE)))
        beside = stack.enter_context(faulty(on.rpc_url, at_random(3, FAULT_SHARE, FAULTS_OF_CHAIN)))
        for peer in peers:
            client(on, front.url, peer).close()
        chain = node_chain(on, front.url, rpc_url=(wrong_url, beside.url))
        started = time.monotonic()
        deadline = started + seconds
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(
                target=_earn,
                args=(chain, on.folder / "nodes", peers[i::num_processes], per_node, deadline),
            )
            for i in range(num_processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert {process.exitcode for process in processes} == {0}, (
            "a node did not settle everything"
        )
        taken = time.monotonic() - started
        injected = behind.injected + front.injected + beside.injected
        num_rows = assert_exactly_once(on, peers)
    assert num_rows == per_node * len(peers) or taken > seconds
    num_faults = injected.total() - injected["none"]
    print(
        f"faults: {num_rows} rewards, one vote for {VOTE_EVERY} of them, in {taken:.0f} s;"
        f" {num_faults} faults in {injected.total()} requests: {dict(injected)}",
        flush=True,
    )
    return [Result(f"{num_rows} records over bad networks: credited once", 1.0, 1.0, 1.0, "of 1")]


def _earn(
    chain: settings.Chain, folder: Path, peers: Sequence[str], rounds: int, deadline: float
) -> None:
    """Let some nodes record rounds, a few at a time, and settle them until nothing is left."""
    log.setup("ERROR", "text")

    def earn(peer: str) -> None:
        for first in range(0, rounds, AT_A_TIME):
            if time.monotonic() > deadline:
                return
            with closing(Ledger(folder / peer / "ledger.db")) as ledger:
                for round in range(first, min(rounds, first + AT_A_TIME)):
                    winners = ["QmWinner"] if round % VOTE_EVERY == 0 else []
                    ledger.record(
                        round, 0, peer, (round * 7) % 1000, winners, secrets.token_hex(32)
                    )
            _settle_rest(chain, folder / peer, 3000.0)

    with ThreadPoolExecutor(len(peers)) as threads:
        list(threads.map(earn, peers))


def _num_events(on: Stage, name: str) -> int:
    return sum(1 for _ in on.coordinator.events(name))


CLAIMS = {
    "load": load,
    "accounts": accounts,
    "simultaneous": simultaneous,
    "kills": kills,
    "faults": faults,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    log.setup("ERROR", "text")
    results = [
        result
        for name in arguments.only
        for result in CLAIMS[name](arguments.scale, arguments.seconds)
    ]
    if arguments.json:
        arguments.json.write_text(
            json.dumps([result.__dict__ for result in results], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

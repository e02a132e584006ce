"""The account service of the version before accounts, upgraded in place with live nodes."""

import io
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from account_service import ENROLMENT_TOKEN, eventually, faulty, serving, some_identity
from eth_account import Account

from tests.account.hosting import hosted
from tests.account.people import signed_in
from tests.account.visitor import texts
from worker.account.vault import Tokens
from worker.chain.account_client import AccountClient
from worker.chain.registration import enrol
from worker.errors import ChainUnreachable

ROOT = Path(__file__).parents[2]
COMMIT = "6c7061c117f340f528029169566531fe52677673"
"""The last one whose account service had one key and no accounts."""
JOURNAL = """
    CREATE TABLE IF NOT EXISTS waiting (
        nonce INTEGER PRIMARY KEY, name TEXT NOT NULL, address TEXT, data BLOB NOT NULL,
        gas INTEGER NOT NULL, price_wei INTEGER NOT NULL, hash TEXT NOT NULL, raw BLOB NOT NULL,
        sent_at REAL NOT NULL
    ) STRICT;
"""
"""The table of that version's journal."""


@pytest.fixture
def program(tmp_path) -> Path:
    """Return the sources of that version."""
    archive = subprocess.run(
        ["git", "archive", COMMIT, "worker"], cwd=ROOT, capture_output=True, timeout=60
    )
    if archive.returncode:
        if os.environ.get("LAB_REQUIRED") == "1":
            pytest.fail(f"LAB_REQUIRED is 1, but {archive.stderr.decode()}")
        pytest.skip(f"the history of this checkout lacks {COMMIT}")
    folder = tmp_path / "before"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    return folder


@contextmanager
def running(program: Path, folder: Path, chain, rpc_url: str, port: int):
    """Run that version's service; it is killed when the block ends."""
    settings = folder / "settings.yaml"
    settings.write_text(
        f"chain: {{rpc_url: '{rpc_url}', contract: '{chain.deployment.contract}',"
        " poll_seconds: 0.2, timeout_seconds: 5}\n"
        f"account: {{port: {port}, state_dir: {folder}, enrolment_token_file:"
        f" {folder / 'enrolment.token'}}}\n"
    )
    (folder / "address").unlink(missing_ok=True)
    with (
        (folder / "log").open("a") as log,
        subprocess.Popen(
            [sys.executable, "-m", "worker", "account", "--settings", settings],
            cwd=program,
            stderr=log,
        ) as process,
    ):
        try:
            eventually((folder / "address").exists)
            yield
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.mark.nightly
def test_nodes_of_the_real_service_go_on_and_what_it_had_pending_is_sent_once(
    chain, program, tmp_path
) -> None:
    parsed = hosted(chain.settings, tmp_path / "account")
    folder = parsed.account.state_dir
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    section = chain.settings.chain.__class__(
        account_url=url, poll_seconds=0.1, timeout_seconds=20.0
    )
    nodes = [some_identity(tmp_path, number) for number in range(2)]
    peers = [node.peer_id for node in nodes]
    places = [tmp_path / f"node-{number}" for number in range(2)]
    is_cut = False

    def fault(said: str) -> str | None:
        return "drop" if is_cut and "eth_sendRawTransaction" in said else None

    with (
        faulty(chain.deployment.rpc_url, fault) as between,
        running(program, folder, chain, between.url, port),
    ):
        owners = {
            enrol(node, ENROLMENT_TOKEN, section, place)
            for node, place in zip(nodes, places, strict=True)
        }
        clients = [AccountClient(section, place) for place in places]
        for client, peer in zip(clients, peers, strict=True):
            client.submit_reward(0, 0, 7, peer)
        eventually(lambda: chain.coordinator.total_rewards(peers) == [7, 7])
        is_cut = True
        for client, peer in zip(clients, peers, strict=True):
            with pytest.raises(ChainUnreachable):
                client.submit_winner(0, [peer], peer)
    (owner,) = owners
    tokens = [client.token() for client in clients]
    count = chain.coordinator.nonce(owner)
    assert chain.coordinator.votes(0, peers[0]) == []
    with serving(parsed, port) as upgraded:
        accounts = upgraded.service.accounts
        assert (accounts.operator.address, accounts.operator.org_id) == (owner, "hivewright")
        eventually(
            lambda: [chain.coordinator.votes(0, peer) for peer in peers] == [[p] for p in peers]
        )
        # The same clients, with the tokens and the connections that they had.
        chain.advance()
        for client, peer in zip(clients, peers, strict=True):
            client.submit_reward(1, 0, 5, peer)
        eventually(lambda: chain.coordinator.total_rewards(peers) == [12, 12])
        assert chain.coordinator.nonce(owner) == count + 4
        assert {node.peer_id for node in accounts.nodes_of(accounts.operator)} == set(peers)
        # Enrolling again changes nothing.
        for node, place, token in zip(nodes, places, tokens, strict=True):
            assert enrol(node, ENROLMENT_TOKEN, section, place) == owner
            assert AccountClient(section, place).token() == token
        host = signed_in(upgraded, "host@example.org")
        assert "7.000" not in texts(host.get("/"))
        assert texts(host.get("/")).count("0.012") == 2


def test_state_of_that_version_is_taken_over(chain, tmp_path) -> None:
    """Its files, written with its own table: address, tokens and pending transactions."""
    parsed = hosted(chain.settings, tmp_path / "account")
    folder = parsed.account.state_dir
    key = Account.create()
    (folder / "account.key").write_text(f"0x{bytes(key.key).hex()}\n")
    (folder / "token.secret").write_text(secrets.token_hex(32) + "\n")
    token = Tokens(folder).issue("QmAda1")
    call = chain.coordinator.register_peer("QmAda1")
    tx_hash, raw = chain.coordinator.sign(key, call, nonce=0, gas=500_000, gas_price_wei=0)
    with sqlite3.connect(folder / "journal.db") as journal:
        journal.executescript(JOURNAL)
        journal.execute(
            "INSERT INTO waiting VALUES (0, ?, ?, ?, 500000, 0, ?, ?, 0)",
            (call.name, call.to, call.data, tx_hash, raw),
        )
    journal.close()
    for _ in range(2):  # the second start finds what the first one made of it
        with serving(parsed) as upgraded:
            assert upgraded.service.accounts.operator.address == key.address
            eventually(lambda: chain.peers_of(key.address) == ["QmAda1"])
            answer = requests.post(
                f"{upgraded.url}/api/submit-winner",
                json={
                    "orgId": "hivewright",
                    "peerId": "QmAda1",
                    "roundNumber": chain.coordinator.current_round(),
                    "winners": ["QmAda1"],
                },
                headers={"Authorization": f"Bearer {token}"},
                timeout=20,
            )
            assert answer.status_code == 200, answer.text
            eventually(lambda: chain.coordinator.votes(chain.coordinator.current_round(), "QmAda1"))
        chain.advance()
    assert chain.coordinator.nonce(key.address) == 3

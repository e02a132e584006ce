"""Our node at a login server of RL Swarm.

The server is a stand-in, written from the description of its interface and never compared with a
real one.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from account_service import eventually, some_identity
from eth_account import Account

from worker import settings
from worker.chain.registration import enrol, open_account
from worker.errors import ContractRefused, IdentityError, SettingsError


class StandIn(ThreadingHTTPServer):
    """A login server: accounts by orgId, a key for each, no tokens."""

    def __init__(self, chain) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.chain = chain
        self.accounts = {"ada": Account.create()}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?orgId=")
        if path != "/api/get-api-key-status":
            return self._answer(404, "not found")
        return self._answer(200, "activated" if query in self.server.accounts else "pending")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        account = self.server.accounts.get(body["orgId"])
        if account is None:
            return self._answer(404, {"error": "user not found"})
        calls, peer = self.server.chain.coordinator, body["peerId"]
        call = {
            "/api/register-peer": lambda: calls.register_peer(peer),
            "/api/submit-reward": lambda: calls.submit_reward(
                body["roundNumber"], body["stageNumber"], body["reward"], peer
            ),
            "/api/submit-winner": lambda: calls.submit_winners(
                body["roundNumber"], body["winners"], peer
            ),
        }[self.path]()
        try:
            receipt = self.server.chain.send(account, call)
        except ContractRefused as refusal:
            return self._answer(400, {"error": refusal.name})
        return self._answer(200, {"hash": receipt.tx_hash})

    def _answer(self, status: int, content: object) -> None:
        body = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture
def server(chain):
    running = StandIn(chain)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def at(server, org_id: str = "ada") -> settings.Chain:
    chain = server.chain
    return settings.Chain(
        account_api="rl-swarm",
        account_url=server.url,
        org_id=org_id,
        rpc_url=chain.settings.chain.rpc_url,
        contract=chain.deployment.contract,
    )


@pytest.fixture
def node(tmp_path_factory):
    return some_identity(tmp_path_factory.getbasetemp())


def test_node_registers_and_earns(chain, server, node, tmp_path: Path) -> None:
    ada = server.accounts["ada"].address
    for _ in range(2):
        assert enrol(node, None, at(server), tmp_path) == ada
    account = open_account(at(server), tmp_path)
    assert account.address() == ada
    account.submit_reward(0, 0, 5, node.peer_id, "00" * 32)
    account.submit_winner(0, [node.peer_id], node.peer_id)
    eventually(lambda: chain.coordinator.total_rewards([node.peer_id]) == [5])
    with pytest.raises(ContractRefused) as refused:
        account.submit_reward(0, 0, 5, node.peer_id)
    assert refused.value.name == "RewardAlreadySubmitted"


def test_account_where_nobody_signed_in_is_refused(server, node, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"pending.*sign in at the server's page"):
        enrol(node, None, at(server, "bob"), tmp_path)


def test_key_that_another_account_registered_is_refused(
    chain, server, node, tmp_path: Path
) -> None:
    (tmp_path / "account.address").write_text(server.accounts["ada"].address + "\n")
    holder = chain.new_account(node.peer_id)
    with pytest.raises(IdentityError, match=holder.address):
        enrol(node, None, at(server), tmp_path)


def test_settings_that_the_server_does_not_tell_are_needed() -> None:
    raw = {"chain": {"account_api": "rl-swarm", "account_url": "http://127.0.0.1:1"}}
    with pytest.raises(SettingsError, match="org_id is not set"):
        settings.parse(raw, "test")

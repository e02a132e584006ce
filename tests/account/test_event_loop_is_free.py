"""No call of the account service reads its database on the event loop, which all others share."""

import asyncio
import traceback

import pytest
import requests
from account_service import some_identity

from tests.account.hosting import ENROLMENT_TOKEN, HOST
from tests.account.people import ADA, signed_in
from worker.chain.account_client import AccountClient
from worker.chain.database import Database
from worker.chain.registration import enrol

PAGES = ("/", "/transactions", "/settings", "/device", "/host", "/market", "/sign-in")


@pytest.fixture
def on_the_loop(monkeypatch) -> list[str]:
    """Return the places from which the database was used on an event loop."""
    found: list[str] = []
    run = Database._run

    def noting(database: Database, *arguments: object) -> list[tuple[object, ...]]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return run(database, *arguments)  # a thread without a loop
        found.append("".join(traceback.format_stack(limit=6)))
        return run(database, *arguments)

    monkeypatch.setattr(Database, "_run", noting)
    return found


def test_pages_and_calls_use_threads(service, tmp_path, on_the_loop) -> None:
    for email in (ADA, HOST):
        visitor = signed_in(service, email)
        for path in PAGES:
            assert visitor.get(path).status_code in (200, 404)
    visitor.submit("/host/invite", on="/host", nodes="1", days="1")
    node, section = some_identity(tmp_path), service.node_chain()
    enrol(node, ENROLMENT_TOKEN, section, tmp_path / "node")
    AccountClient(section, tmp_path / "node").submit_reward(0, 0, 7, node.peer_id)
    token = (tmp_path / "node/account.token").read_text().strip()
    for headers in ({}, {"Authorization": f"Bearer {token}"}, {"Authorization": "Bearer wrong"}):
        assert (
            requests.get(service.url + "/api/swarm", headers=headers, timeout=20).status_code == 200
        )
        rpc = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
        answer = requests.post(service.url + "/rpc", json=rpc, headers=headers, timeout=20)
        assert answer.status_code in (200, 401)
    assert on_the_loop == []

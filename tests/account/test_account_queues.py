import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from account_service import eventually, serving

from tests import preloaded
from tests.account.hosting import PASSPHRASE
from worker import settings
from worker.account.accounts import Accounts
from worker.account.vault import load_account
from worker.chain.queue_status import read_status

ROOT = Path(__file__).parents[2]
PEERS = ["QmAda1", "QmAda2", "QmBob1"]


@pytest.fixture
def people(service):
    """Return ada, bob, and tokens of their nodes."""
    accounts = service.service.accounts
    ada = accounts.create("ada@example.org", 9)
    bob = accounts.create("bob@example.org", 9)
    tokens = {peer: accounts.link(ada if "Ada" in peer else bob, peer) for peer in PEERS}
    return ada, bob, tokens


def post(url: str, path: str, token: str, **body: object) -> tuple[int, dict]:
    headers = {"Authorization": f"Bearer {token}"}
    answer = requests.post(url + path, json=body, headers=headers, timeout=20)
    return answer.status_code, answer.json()


def test_nodes_earn_for_their_own_accounts(chain, service, people) -> None:
    ada, bob, tokens = people
    for peer in PEERS:
        account = ada if "Ada" in peer else bob
        body = {"orgId": account.org_id, "peerId": peer}
        status, answer = post(service.url, "/api/register-peer", tokens[peer], **body)
        assert status == 200, answer
        reward = {"roundNumber": 0, "stageNumber": 0, "reward": 7}
        status, answer = post(service.url, "/api/submit-reward", tokens[peer], **body, **reward)
        assert status == 200, answer
    eventually(lambda: chain.coordinator.total_rewards(PEERS) == [7, 7, 7])
    assert sorted(chain.peers_of(ada.address)) == PEERS[:2]
    assert chain.peers_of(bob.address) == PEERS[2:]
    accounts = service.service.accounts
    assert [each.call for each in accounts.transactions(bob, 9)] == ["submitReward", "registerPeer"]
    assert accounts.nodes_of(bob)[0].last_round == 0


@pytest.mark.parametrize(
    ("peer", "org", "status", "error"),
    [
        ("QmBob1", "ada", 403, "TokenOfAnotherPeer"),
        ("QmBob1", "bob", 404, "User not found"),
        ("QmAda1", "bob", 404, "User not found"),
        ("QmAda1", "hivewright", 404, "User not found"),
        ("QmAda1", "nobody", 404, "User not found"),
    ],
)
def test_token_is_good_for_its_account_and_peer_only(
    service, people, peer, org, status, error
) -> None:
    ada, bob, tokens = people
    org_id = {"ada": ada.org_id, "bob": bob.org_id}.get(org, org)
    got = post(service.url, "/api/register-peer", tokens["QmAda1"], orgId=org_id, peerId=peer)
    assert (got[0], got[1]["error"]) == (status, error)


def test_state_of_all_queues_is_on_disk(service, people) -> None:
    ada, _, tokens = people
    folder = service.service._settings.account.state_dir
    body = {"orgId": ada.org_id, "peerId": "QmAda1"}
    assert post(service.url, "/api/register-peer", tokens["QmAda1"], **body)[0] == 200
    reward = {"roundNumber": 7, "stageNumber": 0, "reward": 7}  # a round that is not open
    assert post(service.url, "/api/submit-reward", tokens["QmAda1"], **body, **reward)[0] != 200

    def is_noted() -> bool:
        found = read_status(folder)
        return found is not None and found.queues.failed == 1 and not found.queues.sent

    eventually(is_noted)
    found = read_status(folder)
    assert found is not None
    assert (found.queues.waiting, found.queues.oldest_at) == (0, None)
    assert (found.queues.last_error or "").startswith("submitReward: ")
    assert found.updated_at <= time.time()


def test_suspended_account_sends_nothing_until_it_is_free_again(service, people) -> None:
    ada, _, tokens = people
    accounts = service.service.accounts
    accounts.set_suspended(ada.id, True)
    body = {"orgId": ada.org_id, "peerId": "QmAda1"}
    status, answer = post(service.url, "/api/register-peer", tokens["QmAda1"], **body)
    assert (status, answer["error"]) == (403, "AccountSuspended")
    key_status = f"{service.url}/api/get-api-key-status?orgId={ada.org_id}"
    assert requests.get(key_status, timeout=10).text == "pending"
    accounts.set_suspended(ada.id, False)
    assert post(service.url, "/api/register-peer", tokens["QmAda1"], **body)[0] == 200
    assert requests.get(key_status, timeout=10).text == "activated"


def test_swarm_names_the_account_of_the_token(service, people) -> None:
    ada, _, tokens = people

    def said(token: str | None) -> dict:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.get(f"{service.url}/api/swarm", headers=headers, timeout=10).json()

    assert (said(tokens["QmAda1"])["account"], said(tokens["QmAda1"])["org_id"]) == (
        ada.address,
        ada.org_id,
    )
    for token in (None, "wrong"):
        assert said(token)["account"] == service.service.address


@contextmanager
def process(host: settings.Settings):
    folder = host.account.state_dir
    (folder / "address").unlink(missing_ok=True)
    (folder / "account.yaml").write_text(settings.dump(host))
    command = [sys.executable, "-m", "worker", "account", "--settings", folder / "account.yaml"]
    with (
        (folder / "log").open("a") as log,
        preloaded.Popen(command, "worker.account.server", stderr=log) as running,
    ):
        try:
            eventually((folder / "address").exists, 120)
            yield running, (folder / "address").read_text().strip()
        finally:
            running.kill()


def test_queues_survive_kill_9_under_load(chain, host) -> None:
    """Each accepted transaction reaches the chain once, for its own account."""
    folder = host.account.state_dir
    accounts = Accounts(folder, load_account(folder), "hivewright", PASSPHRASE)
    people = [accounts.create(f"{name}@example.org", 9) for name in ("ada", "bob", "eve")]
    nodes = [
        (person, peer, accounts.link(person, peer))
        for person in people
        for peer in (f"Qm{person.id}one", f"Qm{person.id}two")
    ]
    accounts.close()
    with process(host) as (running, url):
        for person, peer, token in nodes:
            body = {"orgId": person.org_id, "peerId": peer}
            assert post(url, "/api/register-peer", token, **body)[0] == 200
        for person, peer, token in nodes:
            body = {"orgId": person.org_id, "peerId": peer}
            reward = {"roundNumber": 0, "stageNumber": 0, "reward": person.id}
            assert post(url, "/api/submit-reward", token, **body, **reward)[0] == 200
        running.send_signal(signal.SIGKILL)
    with process(host) as (_, url):
        peers = [peer for _, peer, _ in nodes]
        expected = [person.id for person, _, _ in nodes]
        eventually(lambda: chain.coordinator.total_rewards(peers) == expected)
        for person, peer, token in nodes:
            body = {"orgId": person.org_id, "peerId": peer}
            reward = {"roundNumber": 0, "stageNumber": 0, "reward": person.id}
            status, answer = post(url, "/api/submit-reward", token, **body, **reward)
            assert (status, answer["error"]) == (400, "RewardAlreadySubmitted")


def test_kill_9_with_calls_in_progress_loses_none_and_sends_none_twice(chain, host) -> None:
    """Nodes of three accounts send at once, through two kills, until each call is answered."""
    folder = host.account.state_dir
    accounts = Accounts(folder, load_account(folder), "hivewright", PASSPHRASE)
    people = [accounts.create(f"{name}@example.org", 9) for name in ("ada", "bob", "eve")]
    nodes = [
        (person, peer, accounts.link(person, peer))
        for person in people
        for peer in (f"Qm{person.id}n{number}" for number in range(1, 5))
    ]
    accounts.close()
    current: list[str] = []

    def insist(path: str, token: str, done: str, **body: object) -> None:
        """Send a call until the service accepts it, or says that it was accepted before."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                status, answer = post(current[-1], path, token, **body)
            except requests.RequestException:  # killed; `current` gets the next one
                time.sleep(0.3)
                continue
            if status == 200 or answer["error"] == done:
                return
            assert status == 503, answer
        raise AssertionError(f"{path}: not accepted in time")

    def work(person, peer: str, token: str) -> None:
        named = {"orgId": person.org_id, "peerId": peer}
        reward = {"roundNumber": 0, "stageNumber": 0, "reward": person.id}
        vote = {"roundNumber": 0, "winners": [peer]}
        insist("/api/register-peer", token, "PeerIdAlreadyRegistered", **named)
        insist("/api/submit-reward", token, "RewardAlreadySubmitted", **named, **reward)
        insist("/api/submit-winner", token, "WinnerAlreadyVoted", **named, **vote)

    peers = [peer for _, peer, _ in nodes]
    with ThreadPoolExecutor(len(nodes)) as threads:
        with process(host) as (first, url):
            current.append(url)
            working = [threads.submit(work, *node) for node in nodes]
            eventually(lambda: any(chain.peers_of(person.address) for person in people))
            first.send_signal(signal.SIGKILL)
        with process(host) as (second, url):
            current.append(url)
            eventually(lambda: any(chain.coordinator.total_rewards(peers)))
            second.send_signal(signal.SIGKILL)
        with process(host) as (_, url):
            current.append(url)
            for each in working:
                each.result()
            expected = [person.id for person, _, _ in nodes]
            eventually(lambda: chain.coordinator.total_rewards(peers) == expected)
            eventually(lambda: all(chain.coordinator.votes(0, peer) for peer in peers))
    # Three calls of each of four nodes: none was sent twice.
    assert [chain.coordinator.nonce(person.address) for person in people] == [12, 12, 12]


def test_pending_transaction_of_an_account_is_sent_after_a_restart(chain, host) -> None:
    """The journal is read though its account sends nothing again."""
    with serving(host) as before:
        accounts = before.service.accounts
        ada = accounts.create("ada@example.org", 9)
        queue = before.service.queues.of(ada)
        entry = queue._sign_all([(chain.coordinator.register_peer("QmLate"), 500_000)])[0]
    assert entry.sent_at == 0
    with serving(host):
        eventually(lambda: chain.peers_of(ada.address) == ["QmLate"])

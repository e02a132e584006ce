import sqlite3
import time

import pytest

from tests.account.hosting import PASSPHRASE, hosted
from worker import settings
from worker.account import accounts as module
from worker.account.accounts import DATABASE_FILE, Accounts
from worker.account.queues import Queues
from worker.account.request_bodies import Refused
from worker.account.server import Service
from worker.account.vault import Tokens, load_account
from worker.chain.coordinator import Coordinator
from worker.errors import ResourceError, SecretError

PEERS = [f"QmPeer{number}" for number in range(9)]


def opened(folder, passphrase: str | None = PASSPHRASE) -> Accounts:
    return Accounts(folder, load_account(folder), "hivewright", passphrase)


@pytest.fixture
def accounts(tmp_path):
    opened_accounts = opened(tmp_path)
    yield opened_accounts
    opened_accounts.close()


@pytest.fixture
def ada(accounts):
    return accounts.create("ada@example.org", 2)


@pytest.fixture
def bob(accounts):
    return accounts.create("bob@example.org", 2)


def test_account_of_the_version_before_becomes_the_operators(tmp_path) -> None:
    """Its address, and the tokens that it issued, stay valid."""
    key = load_account(tmp_path)
    token = Tokens(tmp_path).issue(PEERS[0])
    accounts = opened(tmp_path)
    assert accounts.operator.address == key.address
    assert accounts.caller(token) == (PEERS[0], accounts.operator)
    accounts.note_use(accounts.operator, PEERS[0])
    assert [node.peer_id for node in accounts.nodes_of(accounts.operator)] == [PEERS[0]]
    assert accounts.link(accounts.operator, PEERS[0]) == token
    assert accounts.caller(token) == (PEERS[0], accounts.operator)


def test_key_of_an_account_is_encrypted_and_stays_the_same(tmp_path, accounts, ada) -> None:
    key = accounts.key_of(ada)
    assert key.address == ada.address
    stored = (tmp_path / DATABASE_FILE).read_bytes() + (
        tmp_path / f"{DATABASE_FILE}-wal"
    ).read_bytes()
    assert bytes(key.key) not in stored
    assert key.key.hex().encode() not in stored
    again = opened(tmp_path)
    assert again.key_of(again.by_email("ada@example.org")).key == key.key


def test_another_passphrase_is_refused_at_the_start(tmp_path, accounts, ada) -> None:
    with pytest.raises(SecretError, match="not encrypted with this passphrase"):
        opened(tmp_path, "another")


def test_sealed_key_of_one_account_is_no_key_of_another(accounts, ada, bob) -> None:
    """The database can't be made to give an account another's key."""
    accounts.database.execute(
        "UPDATE accounts SET sealed_key = (SELECT sealed_key FROM accounts WHERE id = ?)"
        " WHERE id = ?",
        (ada.id, bob.id),
    )
    with pytest.raises(SecretError, match=bob.address):
        accounts.key_of(bob)


def test_without_a_passphrase_people_have_no_accounts(tmp_path) -> None:
    accounts = opened(tmp_path, None)
    with pytest.raises(Refused, match="passphrase_file"):
        accounts.create("ada@example.org", 2)


def test_token_is_valid_for_its_own_node_until_it_is_revoked(accounts, ada) -> None:
    tokens = {peer: accounts.link(ada, peer) for peer in PEERS[:2]}
    assert accounts.caller(tokens[PEERS[0]]) == (PEERS[0], ada)
    accounts.revoke(ada, PEERS[0])
    assert accounts.caller(tokens[PEERS[0]]) is None
    assert accounts.caller(tokens[PEERS[1]]) == (PEERS[1], ada)
    again = accounts.link(ada, PEERS[0])
    assert accounts.caller(again) == (PEERS[0], ada)
    assert accounts.caller(tokens[PEERS[0]]) is None


def test_only_the_hash_of_a_token_is_stored(tmp_path, accounts, ada) -> None:
    token = accounts.link(ada, PEERS[0])
    stored = b"".join(file.read_bytes() for file in tmp_path.glob(f"{DATABASE_FILE}*"))
    assert PEERS[0].encode() in stored
    assert token.encode() not in stored


def test_token_expires_when_it_is_not_used(accounts, ada, monkeypatch) -> None:
    token = accounts.link(ada, PEERS[0])
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + module.TOKEN_SECONDS - 1)
    assert accounts.caller(token) is not None
    accounts.note_use(ada, PEERS[0])
    monkeypatch.setattr(module.time, "time", lambda: now + 2 * module.TOKEN_SECONDS - 2)
    assert accounts.caller(token) is not None
    monkeypatch.setattr(module.time, "time", lambda: now + 2 * module.TOKEN_SECONDS)
    assert accounts.caller(token) is None


def test_node_that_is_unlinked_while_its_call_waits_stays_so(accounts, ada, bob) -> None:
    for account in (ada, accounts.operator):
        accounts.link(account, PEERS[0])
        accounts.unlink(account, PEERS[0])
        accounts.note_use(account, PEERS[0])
        assert accounts.node(PEERS[0]) is None
    accounts.link(bob, PEERS[0])
    accounts.note_use(ada, PEERS[0])
    assert accounts.nodes_of(bob)[0].seen_at is None


def test_operators_token_can_be_revoked_too(accounts) -> None:
    token = accounts.link(accounts.operator, PEERS[0])
    accounts.revoke(accounts.operator, PEERS[0])
    assert accounts.caller(token) is None


def test_operators_token_of_a_node_that_moved_to_a_person_is_not_valid(accounts, ada) -> None:
    token = accounts.link(accounts.operator, PEERS[0])
    accounts.unlink(accounts.operator, PEERS[0])
    accounts.link(ada, PEERS[0])
    assert accounts.caller(token) is None


def test_node_of_another_account_is_refused_with_both_addresses(accounts, ada, bob) -> None:
    accounts.link(ada, PEERS[0])
    with pytest.raises(Refused, match=f"{ada.address}.*{bob.address}.*unlink it") as caught:
        accounts.link(bob, PEERS[0])
    assert (caught.value.status, caught.value.error) == (409, "PeerOfAnotherAccount")
    accounts.unlink(ada, PEERS[0])
    accounts.link(bob, PEERS[0])
    assert [node.peer_id for node in accounts.nodes_of(bob)] == [PEERS[0]]


def test_account_links_as_many_nodes_as_it_may(accounts, ada) -> None:
    for peer in PEERS[:2]:
        accounts.link(ada, peer)
    accounts.link(ada, PEERS[0])
    with pytest.raises(Refused, match="2 nodes, as many as it may"):
        accounts.link(ada, PEERS[2])
    accounts.set_max_nodes(ada.id, 3)
    accounts.link(accounts.by_id(ada.id), PEERS[2])


@pytest.mark.parametrize("change", ["unlink", "revoke"])
def test_node_of_another_account_can_not_be_changed(accounts, ada, bob, change) -> None:
    token = accounts.link(ada, PEERS[0])
    with pytest.raises(Refused, match="no such node"):
        getattr(accounts, change)(bob, PEERS[0])
    with pytest.raises(Refused, match="no such node"):
        accounts.rename(bob, PEERS[0], "mine")
    assert accounts.caller(token) == (PEERS[0], ada)


def test_suspended_account_links_no_node(accounts, ada) -> None:
    accounts.set_suspended(ada.id, True)
    with pytest.raises(Refused, match="suspended"):
        accounts.link(accounts.by_id(ada.id), PEERS[0])
    accounts.set_suspended(accounts.operator.id, True)
    assert accounts.operator.suspended_at is None


def test_deleted_account_leaves_nothing_of_its_owner(tmp_path, accounts, ada, bob) -> None:
    token = accounts.link(ada, PEERS[0])
    kept = accounts.link(bob, PEERS[1])
    accounts.delete(ada)
    assert accounts.caller(token) is None
    assert accounts.caller(kept) == (PEERS[1], bob)
    assert accounts.by_email("ada@example.org") is None
    with pytest.raises(SecretError, match="no key"):
        accounts.key_of(ada)
    assert accounts.create("ada@example.org", 2).address != ada.address


def test_files_of_the_database_have_nothing_of_a_deleted_account(tmp_path, accounts, ada) -> None:
    """Neither in free pages, nor in the log of changes."""
    ((sealed,),) = accounts.database.execute("SELECT sealed_key FROM accounts WHERE email NOT NULL")

    def stored() -> bytes:
        return b"".join(file.read_bytes() for file in tmp_path.glob(f"{DATABASE_FILE}*"))

    assert sealed in stored()
    assert ada.email.encode() in stored()
    accounts.delete(ada)
    assert sealed not in stored()
    assert ada.email.encode() not in stored()
    assert accounts.deleted_addresses() == [ada.address]


def test_start_removes_the_journal_of_an_account_whose_deletion_was_interrupted(
    tmp_path,
) -> None:
    parsed = hosted(settings.parse({"chain": {"rpc_url": "http://127.0.0.1:1"}}, "test"), tmp_path)
    accounts = opened(tmp_path)
    gone, kept = (accounts.create(email, 2) for email in ("ada@example.org", "bob@example.org"))
    journals = [tmp_path / "journals" / f"{each.address}.db" for each in (gone, kept)]
    queues = Queues(Coordinator(parsed.chain), tmp_path, accounts.key_of)
    for account in (gone, kept):
        queues.of(account)
    queues.close()
    accounts.delete(gone)
    accounts.close()
    service = Service(parsed)
    assert [journal.exists() for journal in journals] == [False, True]
    service.queues.close()
    service.accounts.close()


def test_what_the_host_decided_outlives_the_account(tmp_path, accounts, ada, bob) -> None:
    """Under a name from which nobody learns the e-mail address."""
    accounts.set_suspended(ada.id, True)
    accounts.set_max_nodes(ada.id, 10)
    accounts.set_max_nodes(bob.id, 1)
    cy = accounts.create("cy@example.org", 10)
    for account in (ada, bob, cy):
        accounts.delete(account, 10)
    assert accounts.database.execute("SELECT count(*) FROM former_limits") == [(2,)]
    stored = b"".join(file.read_bytes() for file in tmp_path.glob(f"{DATABASE_FILE}*"))
    assert b"ada@example.org" not in stored
    again = [accounts.create(f"{name}@example.org", 10) for name in ("ada", "bob", "cy")]
    assert [each.suspended_at is not None for each in again] == [True, False, False]
    assert [each.max_nodes for each in again] == [10, 1, 10]
    # Once: later decisions count.
    accounts.set_suspended(again[0].id, False)
    accounts.delete(again[0], 10)
    assert accounts.create("ada@example.org", 10).suspended_at is None


def test_transactions_are_kept_up_to_a_limit(accounts, ada, bob, monkeypatch) -> None:
    monkeypatch.setattr(module, "_KEPT_TRANSACTIONS", 50)
    token = accounts.link(ada, PEERS[0])
    assert token
    for number in range(200):
        accounts.note_sent(ada, PEERS[0], "submitReward", f"0x{number}", number)
    accounts.note_sent(bob, PEERS[1], "submitReward", "0xb", 1)
    newest = [each.hash for each in accounts.transactions(ada, 1000)]
    assert newest[:2] == ["0x199", "0x198"]
    assert 50 <= len(newest) <= 150
    assert [each.hash for each in accounts.transactions(bob, 10)] == ["0xb"]
    assert accounts.nodes_of(ada)[0].last_round == 199


def test_migrations_run_once_and_a_newer_file_is_refused(tmp_path, accounts, ada) -> None:
    accounts.close()
    again = opened(tmp_path)
    assert again.by_email("ada@example.org") == ada
    again.close()
    with sqlite3.connect(tmp_path / DATABASE_FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ResourceError, match=r"version 99 .* expected at most"):
        opened(tmp_path)


def test_interrupted_migration_is_undone_and_run_again(tmp_path, monkeypatch) -> None:
    broken = (*module.MIGRATIONS, ("CREATE TABLE extra (x INTEGER) STRICT", "no statement"))
    monkeypatch.setattr(module, "MIGRATIONS", broken)
    with pytest.raises(ResourceError):
        opened(tmp_path)
    monkeypatch.setattr(module, "MIGRATIONS", (*broken[:-1], broken[-1][:1]))
    accounts = opened(tmp_path)
    assert accounts.database.execute("SELECT count(*) FROM extra") == [(0,)]

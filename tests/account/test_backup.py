"""Backup and restore carry people's accounts."""

import io
import tarfile

from eth_account import Account

from deploys import backup_pack
from tests.account.hosting import PASSPHRASE
from worker.account.accounts import DATABASE_FILE, Accounts
from worker.account.queues import Queues
from worker.account.vault import load_account


def opened(folder) -> Accounts:
    return Accounts(folder, load_account(folder), "hivewright", PASSPHRASE)


def test_restored_service_has_the_accounts_keys_tokens_and_pending_transactions(
    chain, tmp_path
) -> None:
    """The backup is made while the service writes: the files of its databases are not whole."""
    folder = tmp_path / "state/account"
    folder.mkdir(parents=True)
    before = opened(folder)
    ada = before.create("ada@example.org", 3)
    token, fleets = before.link(ada, "QmAda1"), before.link(before.operator, "QmFleet1")
    queues = Queues(chain.coordinator, folder, before.key_of)
    queues.of(ada)._sign_all([(chain.coordinator.register_peer("QmAda1"), 500_000)])
    packed = backup_pack.pack(tmp_path / "state")
    operator, key = before.operator.address, before.key_of(ada)
    assert bytes(key.key) not in packed
    assert bytes(key.key).hex().encode() not in packed
    queues.close()
    before.close()
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "restored", filter="data")
    assert f"account/{DATABASE_FILE}" in names
    assert f"account/journals/{ada.address}.db" in names
    place = tmp_path / "restored/account"
    after = opened(place)
    assert after.operator.address == operator
    assert after.by_email("ada@example.org") == ada
    assert after.key_of(ada) == Account.from_key(key.key)
    assert after.caller(token) == ("QmAda1", ada)
    assert after.caller(fleets) == ("QmFleet1", after.operator)
    queues = Queues(chain.coordinator, place, after.key_of)
    assert [entry.name for entry in queues.waiting(ada)] == ["registerPeer"]
    queues.close()
    after.close()

"""Databases of earlier versions, with rows, are upgraded; a kill within that changes nothing."""

import secrets
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eth_account import Account as EthAccount

from tests.account.stores import PASSPHRASE, open_accounts
from worker.account import sealing
from worker.account.accounts import DATABASE_FILE, Accounts, digest
from worker.account.invitations import Invitations
from worker.account.migrations import MIGRATIONS
from worker.account.sessions import Sessions
from worker.chain.database import Database

ADA, PEER = "ada@example.org", "QmAda1"
KEY = EthAccount.create()
_KILLED_AT = """
import os, signal, sys
from pathlib import Path
from worker.account.migrations import MIGRATIONS
from worker.chain.database import Database

class Dying(Database):
    def _run(self, statement, parameters=()):
        rows = super()._run(statement, parameters)
        if statement == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows

Dying(Path(sys.argv[1]), "", "FULL").migrate(MIGRATIONS)
"""


def at_version(folder: Path, version: int) -> Path:
    """Return a database as that version of its tables left it, with an account and what is its."""
    file = folder / DATABASE_FILE
    database = Database(file, "", "FULL")
    database.migrate(MIGRATIONS[:version])
    until = time.time() + 3600
    if version >= 1:
        sealed = sealing.load_seal(database, PASSPHRASE).close(bytes(KEY.key), KEY.address)
        database.execute(
            "INSERT INTO accounts (id, org_id, address, sealed_key, email, max_nodes, created_at)"
            " VALUES (2, 'account-ada', ?, ?, ?, 3, 5.0)",
            (KEY.address, sealed, ADA),
        )
        database.execute(
            "INSERT INTO nodes (peer_id, account_id, name, linked_at, token_hash, token_expires_at)"
            " VALUES (?, 2, 'gpu-0', 6.0, ?, ?)",
            (PEER, digest("hwn_ada"), until),
        )
        database.execute(
            "INSERT INTO transactions (account_id, peer_id, call, hash, sent_at) VALUES"
            " (2, ?, 'submitReward', '0xab', 7.0)",
            (PEER,),
        )
    if version >= 2:
        database.execute(
            "INSERT INTO sessions (hash, account_id, fresh_at, expires_at) VALUES (?, 2, 8.0, ?)",
            (digest("cookie"), until),
        )
        database.execute(
            "INSERT INTO passkeys (credential_id, account_id, public_key, sign_count, added_at)"
            " VALUES (x'01', 2, x'02', 0, 9.0)"
        )
        database.execute(
            "INSERT INTO invitations (hash, account_id, max_nodes, used, created_at, expires_at)"
            " VALUES (?, 2, 4, 1, 10.0, ?)",
            (digest("hwi_ada"), until),
        )
    database.close()
    return file


def version_of(file: Path) -> int:
    with sqlite3.connect(file) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def require_rows(accounts: Accounts, version: int) -> None:
    """Fail unless what `at_version` wrote is there, and is of use."""
    if version >= 1:
        ada = accounts.by_email(ADA)
        assert ada is not None
        assert (ada.org_id, ada.max_nodes, ada.created_at) == ("account-ada", 3, 5.0)
        assert accounts.key_of(ada).key == KEY.key
        assert accounts.caller("hwn_ada") == (PEER, ada)
        assert [each.hash for each in accounts.transactions(ada, 9)] == ["0xab"]
    if version >= 2:
        session = Sessions(accounts.database).find("cookie")
        assert session is not None
        assert (session.account_id, session.fresh_at, session.email) == (2, 8.0, None)
        rows = accounts.database.execute("SELECT credential_id, public_key, email FROM passkeys")
        assert rows == [(b"\x01", b"\x02", None)]
        left = Invitations(accounts).find(digest("hwi_ada"))
        assert (left.account_id, left.max_nodes, left.used) == (2, 4, 1)


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_database_of_an_earlier_version_is_upgraded_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """The kill comes when the next migration has run all of its statements."""
    monkeypatch.setattr(sealing, "_SCRYPT_COST", 2)
    file = at_version(tmp_path, version)
    last = f"PRAGMA user_version = {version + 1}"
    child = subprocess.run([sys.executable, "-c", _KILLED_AT, file, last], check=False, timeout=60)
    assert child.returncode == -9
    assert version_of(file) == version
    accounts = open_accounts(tmp_path, monkeypatch)
    assert version_of(file) == len(MIGRATIONS)
    require_rows(accounts, version)
    fresh = accounts.create(f"{secrets.token_hex(4)}@example.org", 2)
    assert accounts.caller(accounts.link(fresh, "QmNew1")) == ("QmNew1", fresh)
    accounts.close()

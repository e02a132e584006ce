"""The tables of the account service's database, as migrations.

Each migration runs once, in a transaction of its own. Never change one that was released: append
another.
"""

_ACCOUNTS = (
    """
    CREATE TABLE accounts (
        id INTEGER PRIMARY KEY, org_id TEXT NOT NULL UNIQUE, address TEXT NOT NULL UNIQUE,
        sealed_key BLOB, email TEXT UNIQUE, max_nodes INTEGER NOT NULL, created_at REAL NOT NULL,
        suspended_at REAL, deleted_at REAL
    ) STRICT
    """,
    """
    CREATE TABLE nodes (
        peer_id TEXT PRIMARY KEY, account_id INTEGER NOT NULL REFERENCES accounts,
        name TEXT NOT NULL, linked_at REAL NOT NULL, seen_at REAL, last_round INTEGER,
        token_hash BLOB UNIQUE, token_expires_at REAL, revoked_at REAL
    ) STRICT
    """,
    "CREATE INDEX nodes_of ON nodes (account_id)",
    """
    CREATE TABLE transactions (
        id INTEGER PRIMARY KEY, account_id INTEGER NOT NULL, peer_id TEXT NOT NULL,
        call TEXT NOT NULL, hash TEXT NOT NULL, sent_at REAL NOT NULL
    ) STRICT
    """,
    "CREATE INDEX transactions_of ON transactions (account_id, id)",
    "CREATE TABLE sealing (salt BLOB NOT NULL, sample BLOB NOT NULL) STRICT",
)
_WAYS_IN = (
    """
    CREATE TABLE sessions (
        hash BLOB PRIMARY KEY, account_id INTEGER NOT NULL, fresh_at REAL NOT NULL,
        expires_at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE sign_ins (
        hash BLOB PRIMARY KEY, email TEXT, code_hash BLOB, guesses INTEGER NOT NULL DEFAULT 0,
        data TEXT NOT NULL, expires_at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE passkeys (
        credential_id BLOB PRIMARY KEY, account_id INTEGER NOT NULL, public_key BLOB NOT NULL,
        sign_count INTEGER NOT NULL, added_at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE devices (
        hash BLOB PRIMARY KEY, user_code TEXT NOT NULL UNIQUE, peer_id TEXT NOT NULL,
        name TEXT NOT NULL, is_move INTEGER NOT NULL, account_id INTEGER, is_denied INTEGER NOT NULL
        DEFAULT 0, asked_at REAL NOT NULL, expires_at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE invitations (
        hash BLOB PRIMARY KEY, account_id INTEGER, max_nodes INTEGER NOT NULL,
        used INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL, expires_at REAL NOT NULL
    ) STRICT
    """,
)
_KNOWN_AND_MOVES = (
    "ALTER TABLE sessions ADD COLUMN email TEXT",
    "ALTER TABLE passkeys ADD COLUMN email TEXT",
    # Peers whose HMAC (a token of the operator's account) was revoked.
    "CREATE TABLE ended_tokens (peer_id TEXT PRIMARY KEY) STRICT",
    """
    CREATE TABLE known_browsers (
        hash BLOB PRIMARY KEY, account_id INTEGER NOT NULL, expires_at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE releases (
        peer_id TEXT PRIMARY KEY, from_id INTEGER NOT NULL, to_id INTEGER NOT NULL,
        signature BLOB, expires_at REAL NOT NULL
    ) STRICT
    """,
)
_NOBODYS = (
    # Accounts without a person, which have the nodes of an invitation of the host.
    """
    CREATE VIEW nobodys AS
        SELECT id, address FROM accounts WHERE email IS NULL AND deleted_at IS NULL AND id != 1
    """,
)
_STATES = (
    # NULL: it was not final at the last look-up.
    "ALTER TABLE transactions ADD COLUMN state TEXT",
    "CREATE INDEX transactions_by_hash ON transactions (hash)",
)
_FORMER_LIMITS = (
    # The host's limits of deleted accounts, applied if their people come back.
    """
    CREATE TABLE former_limits (
        email_name BLOB PRIMARY KEY, max_nodes INTEGER NOT NULL, suspended_at REAL
    ) STRICT
    """,
)
MIGRATIONS = (_ACCOUNTS, _WAYS_IN, _KNOWN_AND_MOVES, _NOBODYS, _STATES, _FORMER_LIMITS)

"""Sessions of browsers, and sign-ins that are not complete, in the service's database.

Cookies are random; only their hashes are stored. A sign-in belongs to the browser that began it: a
few guesses of its code are allowed, and guesses in other browsers do not count.
"""

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from worker.account.accounts import digest
from worker.account.request_bodies import Refused
from worker.chain.database import Database

SESSION_SECONDS = 14 * 24 * 3600.0
FRESH_SECONDS = 300.0
"""Seconds after a sign-in in which a person may export the key or delete the account."""
SIGN_IN_SECONDS = 900.0
MAX_GUESSES = 5
CODE_DIGITS = 8
HOST_CODE_LETTERS = 12
"""Length of a code that the host prints: too long to guess, so there is no limit per account."""
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""Without vowels, which could form words, and without similar letters (RFC 8628, 6.1)."""
KNOWN_SECONDS = 365 * 24 * 3600.0
MAX_KNOWN = 50
"""Number of browsers of an account to remember, the newest ones."""


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that is signed in. `csrf`: token in its forms; `fresh_at`: time of its sign-in.

    `email`: the address with which the person signed in; None: an old session without it.
    """

    hash: bytes
    account_id: int
    fresh_at: float
    csrf: str
    email: str | None

    @property
    def is_fresh(self) -> bool:
        return time.time() - self.fresh_at < FRESH_SECONDS


@dataclass(frozen=True, slots=True)
class SignIn:
    """A sign-in that is not complete; `data`: values of its way of signing in."""

    hash: bytes
    email: str | None
    data: dict[str, Any]


class Sessions:
    """The sessions and sign-ins in the database. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- sessions

    def start(
        self,
        account_id: int,
        email: str,
    ) -> str:
        """Return the cookie of a new session of the person with this e-mail address."""
        cookie = secrets.token_urlsafe(32)
        now = time.time()
        self._database.execute(
            "INSERT INTO sessions (hash, account_id, fresh_at, expires_at, email) VALUES"
            " (?, ?, ?, ?, ?)",
            (digest(cookie), account_id, now, now + SESSION_SECONDS, email),
        )
        return cookie

    def find(self, cookie: str) -> Session | None:
        """Return the session of a cookie; None if it is unknown or has ended."""
        rows = self._database.execute(
            "SELECT hash, account_id, fresh_at, email FROM sessions WHERE hash = ? AND"
            " expires_at > ?",
            (digest(cookie), time.time()),
        )
        csrf = hmac.new(cookie.encode(), b"csrf", hashlib.sha256).hexdigest()
        if not rows:
            return None
        key, account_id, fresh_at, email = rows[0]
        return Session(key, account_id, fresh_at, csrf, email)

    def end(self, session: Session) -> None:
        self._database.execute("DELETE FROM sessions WHERE hash = ?", (session.hash,))

    def end_all(self, account_id: int) -> None:
        """End all sessions of the account, and forget its browsers."""
        with self._database.transaction() as run:
            run("DELETE FROM sessions WHERE account_id = ?", (account_id,))
            run("DELETE FROM known_browsers WHERE account_id = ?", (account_id,))

    # ---- browsers that have signed in before

    def know(self, account_id: int) -> str:
        """Return the cookie of a browser that has signed in to the account."""
        cookie = secrets.token_urlsafe(32)
        with self._database.transaction() as run:
            run(
                "INSERT INTO known_browsers VALUES (?, ?, ?)",
                (digest(cookie), account_id, time.time() + KNOWN_SECONDS),
            )
            run(
                "DELETE FROM known_browsers WHERE hash IN (SELECT hash FROM known_browsers WHERE"
                " account_id = ? ORDER BY expires_at DESC LIMIT -1 OFFSET ?)",
                (account_id, MAX_KNOWN),
            )
        return cookie

    def known_account(self, cookie: str) -> int | None:
        """Return the account that the browser with this cookie has signed in to before."""
        rows = self._database.execute(
            "SELECT account_id FROM known_browsers WHERE hash = ? AND expires_at > ?",
            (digest(cookie), time.time()),
        )
        return int(rows[0][0]) if rows else None

    # ---- sign-ins

    def begin(
        self,
        data: dict[str, Any],
        email: str | None = None,
        code: str | None = None,
    ) -> str:
        """Return the cookie of a new sign-in; `code`: the code that its browser must show."""
        self.forget_old()
        cookie = secrets.token_urlsafe(32)
        self._database.execute(
            "INSERT INTO sign_ins (hash, email, code_hash, data, expires_at) VALUES"
            " (?, ?, ?, ?, ?)",
            (
                digest(cookie),
                email,
                None if code is None else digest(code),
                json.dumps(data),
                time.time() + SIGN_IN_SECONDS,
            ),
        )
        return cookie

    def sign_in(self, cookie: str) -> SignIn:
        """Return the sign-in of a cookie. Raises Refused if it is unknown or has ended."""
        rows = self._database.execute(
            "SELECT hash, email, data FROM sign_ins WHERE hash = ? AND expires_at > ?",
            (digest(cookie), time.time()),
        )
        if not rows:
            raise _sign_in_over()
        key, email, data = rows[0]
        return SignIn(key, email, json.loads(data))

    def complete(self, sign_in: SignIn) -> None:
        """End a sign-in, which can be completed once. Raises Refused if it was."""
        if not self._database.execute(
            "DELETE FROM sign_ins WHERE hash = ? RETURNING 1", (sign_in.hash,)
        ):
            raise _sign_in_over()

    def guess(
        self,
        sign_in: SignIn,
        code: str,
    ) -> bool:
        """Return whether the code is right; the guess is counted before the comparison.

        Raises Refused after too many guesses, whatever the code.
        """
        rows = self._database.execute(
            "UPDATE sign_ins SET guesses = guesses + 1 WHERE hash = ? RETURNING guesses, code_hash",
            (sign_in.hash,),
        )
        if not rows:
            raise _sign_in_over()
        guesses, code_hash = rows[0]
        if guesses > MAX_GUESSES:
            raise Refused(
                429, "TooManyGuesses", f"{MAX_GUESSES} wrong codes; begin the sign-in again"
            )
        return code_hash is not None and hmac.compare_digest(code_hash, digest(plain(code)))

    def set_code(
        self,
        email: str,
        code: str,
    ) -> int:
        """Set the code of the e-mail's open sign-ins, and return their number."""
        rows = self._database.execute(
            "UPDATE sign_ins SET code_hash = ?, guesses = 0 WHERE email = ? AND expires_at > ?"
            " RETURNING 1",
            (digest(plain(code)), email, time.time()),
        )
        return len(rows)

    def forget_old(self) -> None:
        """Remove expired rows, except invitations whose account has no person yet."""
        now = (time.time(),)
        self._database.execute("DELETE FROM sign_ins WHERE expires_at < ?", now)
        self._database.execute("DELETE FROM sessions WHERE expires_at < ?", now)
        self._database.execute("DELETE FROM devices WHERE expires_at < ?", now)
        self._database.execute("DELETE FROM known_browsers WHERE expires_at < ?", now)
        self._database.execute("DELETE FROM releases WHERE expires_at < ?", now)
        self._database.execute(
            "DELETE FROM invitations WHERE expires_at < ? AND ifnull(account_id, 0) NOT IN"
            " (SELECT id FROM nobodys)",
            now,
        )


def new_code() -> str:
    """Return a random code that people can type."""
    return f"{secrets.randbelow(10**CODE_DIGITS):0{CODE_DIGITS}d}"


def new_host_code() -> str:
    """Return a random code that the host gives to a person, in groups."""
    letters = "".join(secrets.choice(LETTERS) for _ in range(HOST_CODE_LETTERS))
    return f"{letters[:4]}-{letters[4:8]}-{letters[8:]}"


def plain(code: str) -> str:
    """Return a typed code in its stored form, without separators and in one case."""
    return code.upper().replace(" ", "").replace("-", "")


def _sign_in_over() -> Refused:
    return Refused(
        400, "SignInOver", "this sign-in is over, or began in another browser; begin it again"
    )

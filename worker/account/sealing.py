"""Encryption of people's keys at rest, with a key derived from the service's passphrase."""

import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from worker.chain.database import Database
from worker.errors import SecretError

_NONCE_BYTES = 12
_SCRYPT_COST = 2**15
"""Parameters of scrypt: 32 MiB and a tenth of a second, once at the start."""
_NAMES = b"hivewright/names/1/"
_SAMPLE = b"hivewright/sealing/1"


class Seal:
    """AES-GCM under a key derived from a passphrase; the label is authenticated."""

    def __init__(
        self,
        passphrase: str,
        salt: bytes,
    ) -> None:
        self._key = Scrypt(salt, length=32, n=_SCRYPT_COST, r=8, p=1).derive(passphrase.encode())
        self._cipher = AESGCM(self._key)

    def name_of(self, text: str) -> bytes:
        """Return a keyed hash of the text: always the same, and useless without the key."""
        return hmac.digest(self._key, _NAMES + text.encode(), "sha256")

    def close(
        self,
        content: bytes,
        label: str,
    ) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, label.encode())

    def open(
        self,
        sealed: bytes,
        label: str,
    ) -> bytes:
        """Return the content. Raises SecretError if it was sealed with another key or label."""
        nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, content, label.encode())
        except (InvalidTag, ValueError):  # ValueError: too short to be sealed data
            raise SecretError(
                f"key of {label}: not encrypted with this passphrase; expected the passphrase in"
                " account.passphrase_file that the service had before"
            ) from None


def load_seal(database: Database, passphrase: str) -> Seal:
    """Return the seal of this database, which the first start creates.

    Raises SecretError if the database was made with another passphrase.
    """
    with database.transaction() as run:
        rows = run("SELECT salt, sample FROM sealing")
        salt = rows[0][0] if rows else secrets.token_bytes(16)
        seal = Seal(passphrase, salt)
        if rows:
            seal.open(rows[0][1], "sample")
        else:
            run("INSERT INTO sealing VALUES (?, ?)", (salt, seal.close(_SAMPLE, "sample")))
    return seal

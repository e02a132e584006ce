"""A node's own wallet, which signs and sends in place of an account service.

The key is in `wallet.json`, an encrypted keystore (version 3) that other programs can read too. Its
password comes from a file, never from a command line or the environment. Only one process at a time
may use it, because a second one would assign the same nonces.
"""

import json
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

from eth_account import Account
from eth_account.signers.local import LocalAccount

from worker import settings
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.market import Market
from worker.chain.peer_proof import Proof, registration
from worker.chain.transaction_queue import Sender
from worker.errors import IdentityError, SettingsError
from worker.runtime import host
from worker.runtime.files import LINE, read_secret, write_whole

log = logging.getLogger(__name__)

KEYSTORE_FILE = "wallet.json"
JOURNAL_FILE = "journal.db"


class Wallet:
    """The wallet in `chain.wallet_dir`, locked until `close`.

    Raises IdentityError if it is missing or its password does not decrypt it, SettingsError without
    a password, ResourceError if another process has locked it.
    """

    def __init__(self, chain: settings.Chain) -> None:
        folder = _folder(chain)
        self._account = _open(folder / KEYSTORE_FILE, _password(chain))
        self._lock = host.lock_folder(folder, "chain.wallet_dir")
        self._coordinator = Coordinator(chain)
        self._sender = Sender(self._coordinator, self._account, folder / JOURNAL_FILE)

    def address(self) -> str:
        return str(self._account.address)

    def register_peer(
        self,
        peer_id: str,
        proof: Proof | None = None,
    ) -> str:
        return self._send(registration(self._coordinator, peer_id, proof))

    def submit_reward(
        self,
        round: int,
        stage: int,
        reward: int,
        peer_id: str,
        digest: str | None = None,
    ) -> str:
        call = self._coordinator.submit_reward(round, stage, reward, peer_id, digest)
        return self._send(call)

    def submit_winner(
        self,
        round: int,
        winners: Sequence[str],
        peer_id: str,
    ) -> str:
        return self._send(self._coordinator.submit_winners(round, winners, peer_id))

    def guess_answer(
        self, market: Market, game: int, peer_id: str, round: int, choice: int, bet: int
    ) -> str:
        return self._send(market.guess_answer(game, peer_id, round, choice, bet))

    def claim_reward(
        self,
        market: Market,
        game: int,
        peer_id: str,
    ) -> str:
        return self._send(market.claim_reward(game, peer_id))

    def tend(self) -> None:
        self._sender.tend()

    def close(self) -> None:
        self._sender.close()
        self._lock.close()

    def _send(self, call: Call) -> str:
        tx_hash = self._sender.send(call)
        log.info("sent call=%s hash=%s", call.name, tx_hash)
        return tx_hash


def create(chain: settings.Chain) -> str:
    """Create the wallet unless it exists, and return its address. Raises as `Wallet` does."""
    file = _folder(chain) / KEYSTORE_FILE
    password = _password(chain)
    # A lost wallet that was used is not replaced by a new one: it may own peers and money.
    if not file.exists() and not file.with_name(JOURNAL_FILE).exists():
        keystore = Account.encrypt(secrets.token_bytes(32), password)
        write_whole(file, json.dumps(keystore) + "\n", mode=0o600)
    return str(_open(file, password).address)


def _open(file: Path, password: str) -> LocalAccount:
    try:
        account: LocalAccount = Account.from_key(Account.decrypt(file.read_text(), password))
    except FileNotFoundError:
        raise IdentityError(
            f"{file}: missing; restore the wallet from its backup; `hivewright enrol` makes one for"
            " a new node"
        ) from None
    except OSError as error:
        raise IdentityError(f"{file}: {error.strerror}; expected an encrypted keystore") from None
    except ValueError as error:
        reason = "the password of chain.wallet_password_file does not open it"
        if "mac mismatch" not in str(error).lower():
            reason = "no encrypted keystore of version 3"
        raise IdentityError(f"{file}: {reason}; restore both from their backups") from None
    except (KeyError, TypeError, AttributeError, NotImplementedError):
        # eth_keyfile raises these for other JSON.
        raise IdentityError(
            f"{file}: no encrypted keystore of version 3; restore it from its backup"
        ) from None
    return account


def _folder(chain: settings.Chain) -> Path:
    if chain.wallet_dir is None:
        raise SettingsError("chain.wallet_dir: not set; expected the folder of this node's wallet")
    return chain.wallet_dir


def _password(chain: settings.Chain) -> str:
    file = chain.wallet_password_file
    if file is None:
        raise SettingsError(
            "chain.wallet_password_file: not set; expected a file with the wallet's password"
        )
    return read_secret(
        file, "one line, the wallet's password", "chain.wallet_password_file", form=LINE
    )

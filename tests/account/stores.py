"""The account service's database without the service, with a key that costs little to derive."""

import time
from pathlib import Path

import pytest

from worker.account import sealing
from worker.account.accounts import Accounts
from worker.account.vault import load_account

PASSPHRASE = "correct horse battery staple"


def open_accounts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, passphrase: str | None = PASSPHRASE
) -> Accounts:
    monkeypatch.setattr(sealing, "_SCRYPT_COST", 2)
    return Accounts(folder, load_account(folder), "hivewright", passphrase)


class Clock:
    """Replaces `time.time` of the whole process until the test ends; moves on request only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(time, "time", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds

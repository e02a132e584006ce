"""People's keys at rest: opened with their passphrase and label, and otherwise not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worker.account import sealing
from worker.account.migrations import MIGRATIONS
from worker.account.sealing import Seal, load_seal
from worker.chain.database import Database
from worker.errors import SecretError

SALT = b"s" * 16


@pytest.fixture(autouse=True)
def _cheap_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_SCRYPT_COST", 2)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "accounts.db", "", "NORMAL")
    opened.migrate(MIGRATIONS)
    yield opened
    opened.close()


@pytest.fixture
def seal() -> Seal:
    return Seal("correct horse", SALT)


def refusal(seal: Seal, sealed: bytes, label: str) -> str:
    with pytest.raises(SecretError) as refused:
        seal.open(sealed, label)
    return str(refused.value)


@hypothesis_settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=80), label=st.text(max_size=8), place=st.integers(0, 200))
def test_content_comes_back_unless_a_byte_was_changed(
    seal: Seal, content: bytes, label: str, place: int
) -> None:
    sealed = seal.close(content, label)
    assert seal.open(sealed, label) == content
    at = place % len(sealed)
    changed = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
    for damaged in (changed, sealed[:at], sealed + b"x"):
        assert refusal(seal, damaged, label).startswith(f"key of {label}: not encrypted with this")


@pytest.mark.parametrize(
    ("passphrase", "salt"), [("correct horse!", SALT), ("correct horse", b"t" * 16), ("", SALT)]
)
def test_other_passphrase_or_salt_opens_nothing(seal: Seal, passphrase: str, salt: bytes) -> None:
    message = refusal(Seal(passphrase, salt), seal.close(b"key", "0xA"), "0xA")
    assert "expected the passphrase in account.passphrase_file" in message


def test_label_is_part_of_what_is_sealed(seal: Seal) -> None:
    assert refusal(seal, seal.close(b"key", "0xA"), "0xB").startswith("key of 0xB: ")


def test_same_content_is_never_sealed_the_same_way(seal: Seal) -> None:
    assert len({seal.close(b"key", "0xA") for _ in range(20)}) == 20


def test_database_keeps_its_salt_and_refuses_another_passphrase(database: Database) -> None:
    sealed = load_seal(database, "correct horse").close(b"key", "0xA")
    assert load_seal(database, "correct horse").open(sealed, "0xA") == b"key"
    with pytest.raises(SecretError, match="key of sample: not encrypted with this passphrase"):
        load_seal(database, "incorrect horse")
    assert database.execute("SELECT count(*) FROM sealing") == [(1,)]
    assert load_seal(database, "correct horse").open(sealed, "0xA") == b"key"

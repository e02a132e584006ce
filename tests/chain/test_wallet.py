import json
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from account_service import eventually, faulty, some_identity

from worker import enrolment, settings
from worker.chain import peer_proof, registration, wallet
from worker.chain import transaction_queue as sender_module
from worker.chain.coordinator import Coordinator
from worker.chain.ledger import Ledger
from worker.chain.settlement import Settlement
from worker.chain.wallet import Wallet
from worker.errors import ChainError, ContractRefused, IdentityError, ResourceError, SettingsError


@pytest.fixture(autouse=True)
def cheap_keys(monkeypatch) -> None:
    """A real keystore costs half a second each way; one test below takes the time."""
    encrypt = wallet.Account.encrypt
    monkeypatch.setattr(
        wallet.Account, "encrypt", lambda key, password: encrypt(key, password, iterations=2)
    )


def wallet_chain(chain, folder: Path, **changes: object) -> settings.Chain:
    folder.mkdir(exist_ok=True)
    password = folder / "password"
    if not password.exists():
        password.write_text("correct horse\n")
    raw = {
        "rpc_url": chain.deployment.rpc_url,
        "contract": chain.deployment.contract,
        "wallet_dir": str(folder / "wallet"),
        "wallet_password_file": str(password),
        "poll_seconds": 0.1,
    }
    return settings.parse({"chain": raw | changes}, "test").chain


@pytest.fixture
def own(chain, tmp_path) -> settings.Chain:
    parsed = wallet_chain(chain, tmp_path / "node")
    wallet.create(parsed)
    return parsed


def test_lone_node_enrols_and_settles_with_its_own_wallet(chain, tmp_path, monkeypatch) -> None:
    monkeypatch.undo()  # a keystore as strong as it really is
    parsed = wallet_chain(chain, tmp_path)
    node = settings.Settings(
        node=settings.Node(state_dir=tmp_path, min_free_disk_mb=0), chain=parsed
    )
    enrolment.run(node)
    enrolment.run(node)
    identity, enrolled = enrolment.load(node)
    assert enrolled.registered
    address = wallet.create(parsed)
    assert chain.coordinator.owner_of(identity.peer_id) == address
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record(0, 0, identity.peer_id, 412, ["QmOther"], "ab" * 32)
    with closing(registration.open_account(parsed, tmp_path)) as account:
        settling = Settlement(ledger, Coordinator(parsed), account, parsed)
        settling.start()
        try:
            assert settling.flush(30), settling.status()
        finally:
            settling.close()
    (row,) = ledger.rows()
    assert (row.reward_state, row.vote_state) == ("confirmed", "confirmed")
    assert chain.coordinator.submitted_reward(0, 0, identity.peer_id) == 412
    assert chain.coordinator.reward_digest(row.reward_hash) == "ab" * 32
    assert chain.coordinator.nonce(address) == 3


def test_keystore_is_encrypted_and_for_its_owner_alone(own, tmp_path) -> None:
    file = tmp_path / "node/wallet/wallet.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    held = json.loads(file.read_text())
    assert (held["version"], held["crypto"]["kdf"]) == (3, "scrypt")
    with closing(Wallet(own)) as opened:
        assert held["address"].lower() == opened.address()[2:].lower()


def test_wallet_that_has_sent_is_never_made_anew(chain, own, tmp_path) -> None:
    with closing(Wallet(own)) as opened:
        opened.register_peer("me")
    (tmp_path / "node/wallet/wallet.json").unlink()
    for attempt in (lambda: Wallet(own), lambda: wallet.create(own)):
        with pytest.raises(
            IdentityError, match=r"wallet.json: missing; restore the wallet from its backup"
        ):
            attempt()
    assert not (tmp_path / "node/wallet/wallet.json").exists()


@pytest.mark.parametrize(
    ("password", "error", "message"),
    [
        (
            "wrong",
            IdentityError,
            "wallet.json: the password of chain.wallet_password_file does not open it",
        ),
        (" \n", SettingsError, r"password \(chain.wallet_password_file\): is empty"),
        (None, SettingsError, r"password \(chain.wallet_password_file\): No such file"),
    ],
)
def test_password_that_opens_nothing_is_explained(own, tmp_path, password, error, message) -> None:
    file = tmp_path / "node/password"
    if password is None:
        file.unlink()
    else:
        file.write_text(password)
    with pytest.raises(error, match=message):
        Wallet(own)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 3}',
        '{"version": 4, "crypto": {}}',
        '{"version": 3, "crypto": 1}',
    ],
)
def test_file_that_is_no_keystore_is_explained(own, tmp_path, text) -> None:
    (tmp_path / "node/wallet/wallet.json").write_text(text)
    with pytest.raises(
        IdentityError, match=r"wallet.json: no encrypted keystore of version 3; restore"
    ):
        Wallet(own)


def test_second_process_with_the_wallet_is_refused(own) -> None:
    with (
        closing(Wallet(own)),
        pytest.raises(ResourceError, match=r"\(chain.wallet_dir\): in use by process"),
    ):
        Wallet(own)
    Wallet(own).close()


def test_account_without_money_on_a_chain_with_prices_is_told_what_it_lacks(
    own, monkeypatch
) -> None:
    with closing(Wallet(own)) as opened:
        monkeypatch.setattr(opened._coordinator, "gas_price", lambda: 10**9)
        with pytest.raises(
            ChainError, match="send the account that pays for transactions some money"
        ):
            opened.register_peer("me")


def test_refusals_come_by_name(chain, own) -> None:
    chain.new_account("me")
    with closing(Wallet(own)) as opened:
        with pytest.raises(ContractRefused) as caught:
            opened.register_peer("me")
        assert caught.value.name == "PeerIdAlreadyRegistered"


def test_peer_of_somebody_else_stops_enrolment_with_both_accounts(
    chain, own, tmp_path, tmp_path_factory
) -> None:
    node = some_identity(tmp_path_factory.getbasetemp())
    outsider = chain.new_account()
    shown = peer_proof.of_registration(node, chain.deployment, outsider.address)
    assert chain.send(outsider, peer_proof.call(chain.coordinator, node.peer_id, shown)).succeeded
    with pytest.raises(
        IdentityError, match=f"registered by {outsider.address}, but this node's account is 0x"
    ):
        registration.enrol(node, None, own, tmp_path)


def test_restart_sends_what_no_node_had_taken(chain, own, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sender_module, "STUCK_SECONDS", 1.0)
    fault = lambda seen: "drop" if "eth_sendRawTransaction" in seen else None  # noqa: E731
    with faulty(chain.deployment.rpc_url, fault) as proxy:
        cut_off = wallet_chain(chain, tmp_path / "node", rpc_url=proxy.url, timeout_seconds=1.0)
        with (
            closing(Wallet(cut_off)) as before,
            pytest.raises(Exception, match=r"no connection|no answer"),
        ):
            before.register_peer("me")
    with closing(Wallet(own)) as after:
        eventually(lambda: after.tend() or chain.coordinator.owner_of("me") == after.address())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"account_url": "http://a"}, "chain: account_url and wallet_dir are both set"),
        (
            {"wallet_password_file": None},
            "chain: wallet_dir is set and wallet_password_file is not",
        ),
        ({"rpc_url": None}, "chain: wallet_dir is set, rpc_url and deployment_file are not"),
    ],
)
def test_settings_that_contradict_are_refused(chain, tmp_path, changes, message) -> None:
    with pytest.raises(SettingsError, match=message):
        wallet_chain(chain, tmp_path, **changes)


def test_password_never_stands_in_a_command_line() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "worker", "enrol", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "password" not in helped

"""Nodes' messages when they refuse transactions, by client, and the effect of each.

The texts are from the clients' public sources; anvil's are also produced by the real program.
"""

import pytest
import rlp
from eth_account import Account

from worker import settings
from worker.chain import client as client_module
from worker.chain.client import (
    NonceUsed,
    NotTakenNow,
    TransactionRefused,
    Underpriced,
    raise_refusal,
)
from worker.chain.coordinator import Coordinator
from worker.chain.refusals import Refusal, classify, minimum_wei
from worker.chain.rpc import Rpc
from worker.chain.transaction_queue import Sender
from worker.errors import ChainError, ChainUnreachable, SettingsError

R = Refusal
TEXTS = [
    # geth
    ("geth", "nonce too low: next nonce 5, tx nonce 4", R.NONCE_TOO_LOW),
    ("geth", "nonce too high: next nonce 5, tx nonce 9", R.NONCE_TOO_HIGH),
    ("geth", "already known", R.ALREADY_KNOWN),
    ("geth", "transaction underpriced: gas tip cap 1, minimum needed 3", R.UNDERPRICED),
    ("geth", "transaction gas price below minimum: gas tip cap 1, minimum needed 3", R.UNDERPRICED),
    ("geth", "transaction underpriced: tip needed 3, tip permitted 1", R.UNDERPRICED),
    (
        "geth",
        "max fee per gas less than block base fee: address 0x1f, maxFeePerGas: 1, baseFee: 3",
        R.UNDERPRICED,
    ),
    ("geth", "replacement transaction underpriced", R.REPLACEMENT_UNDERPRICED),
    (
        "geth",
        "replacement transaction underpriced: new tx gas fee cap 3 <= 3 queued",
        R.REPLACEMENT_UNDERPRICED,
    ),
    ("geth", "future transaction tries to replace pending", R.REPLACEMENT_UNDERPRICED),
    (
        "geth",
        "insufficient funds for gas * price + value: balance 0, tx cost 2, overshot 2",
        R.INSUFFICIENT_FUNDS,
    ),
    ("geth", "intrinsic gas too low: gas 0, minimum needed 21000", R.INTRINSIC_GAS),
    ("geth", "exceeds block gas limit", R.GAS_LIMIT_EXCEEDED),
    ("geth", "transaction gas limit too high (cap: 16777216, tx: 20000000)", R.GAS_LIMIT_EXCEEDED),
    ("geth", "tx fee (1.20 ether) exceeds the configured cap (1.00 ether)", R.FEE_CAP_EXCEEDED),
    ("geth", "txpool is full", R.POOL_FULL),
    ("geth", "account limit exceeded", R.POOL_FULL),
    ("geth", "invalid chain id for signer: have 1 want 31337", R.CHAIN_ID),
    # erigon
    ("erigon", "nonce too low", R.NONCE_TOO_LOW),
    ("erigon", "ALREADY_EXISTS: already known", R.ALREADY_KNOWN),
    ("erigon", "INTERNAL_ERROR: existing tx with same hash", R.ALREADY_KNOWN),
    ("erigon", "existing txn with same hash", R.ALREADY_KNOWN),
    ("erigon", "INTERNAL_ERROR: underpriced", R.UNDERPRICED),
    ("erigon", "FEE_TOO_LOW: fee too low", R.UNDERPRICED),
    ("erigon", "INTERNAL_ERROR: could not replace existing tx", R.REPLACEMENT_UNDERPRICED),
    ("erigon", "replacement transaction underpriced", R.REPLACEMENT_UNDERPRICED),
    ("erigon", "INTERNAL_ERROR: insufficient funds", R.INSUFFICIENT_FUNDS),
    ("erigon", "INTERNAL_ERROR: IntrinsicGas", R.INTRINSIC_GAS),
    ("erigon", "gas limit too high. Max: 30000000", R.GAS_LIMIT_EXCEEDED),
    ("erigon", "INTERNAL_ERROR: pending sub-pool is full", R.POOL_FULL),
    ("erigon", "baseFee sub-pool is full", R.POOL_FULL),
    ("erigon", "invalid chain id, expected: 31337 got: 1", R.CHAIN_ID),
    # besu
    ("besu", "Nonce too low", R.NONCE_TOO_LOW),
    ("besu", "Transaction nonce is too distant from current sender nonce", R.NONCE_TOO_HIGH),
    ("besu", "Known transaction", R.ALREADY_KNOWN),
    ("besu", "Gas price below configured minimum gas price", R.UNDERPRICED),
    ("besu", "Gas price below current base fee", R.UNDERPRICED),
    ("besu", "Transaction replacement underpriced", R.REPLACEMENT_UNDERPRICED),
    ("besu", "Upfront cost exceeds account balance", R.INSUFFICIENT_FUNDS),
    ("besu", "Intrinsic gas exceeds gas limit", R.INTRINSIC_GAS),
    ("besu", "Transaction gas limit exceeds block gas limit", R.GAS_LIMIT_EXCEEDED),
    ("besu", "Transaction fee cap exceeded", R.FEE_CAP_EXCEEDED),
    ("besu", "Wrong chainId", R.CHAIN_ID),
    ("besu", "ChainId not supported", R.CHAIN_ID),
    # nethermind
    ("nethermind", "OldNonce, Current nonce: 5, nonce of rejected tx: 4", R.NONCE_TOO_LOW),
    ("nethermind", "NonceGap, Future nonce. Expected nonce: 5", R.NONCE_TOO_HIGH),
    ("nethermind", "AlreadyKnown", R.ALREADY_KNOWN),
    (
        "nethermind",
        "FeeTooLow, MaxFeePerGas too low. MaxFeePerGas: 1, BaseFee: 3, MaxPriority: 1",
        R.UNDERPRICED,
    ),
    ("nethermind", "FeeTooLowToCompete", R.POOL_FULL),
    ("nethermind", "ReplacementNotAllowed", R.REPLACEMENT_UNDERPRICED),
    ("nethermind", "OwnNonceAlreadyUsed", R.REPLACEMENT_UNDERPRICED),
    (
        "nethermind",
        "InsufficientFunds, Account balance: 0, cumulative cost: 21000",
        R.INSUFFICIENT_FUNDS,
    ),
    ("nethermind", "Invalid, IntrinsicGasTooLow", R.INTRINSIC_GAS),
    (
        "nethermind",
        "GasLimitExceeded, Gas limit: 30000000, gas limit of rejected tx: 40000000",
        R.GAS_LIMIT_EXCEEDED,
    ),
    ("nethermind", "Invalid, InvalidTxChainId: Expected 31337, got 1", R.CHAIN_ID),
    # reth
    ("reth", "nonce too low: next nonce 5, tx nonce 4", R.NONCE_TOO_LOW),
    ("reth", "nonce too high", R.NONCE_TOO_HIGH),
    ("reth", "already known", R.ALREADY_KNOWN),
    ("reth", "transaction underpriced", R.UNDERPRICED),
    ("reth", "transaction priority fee below minimum required priority fee 3", R.UNDERPRICED),
    ("reth", "max fee per gas less than block base fee", R.UNDERPRICED),
    ("reth", "replacement transaction underpriced", R.REPLACEMENT_UNDERPRICED),
    ("reth", "insufficient funds for gas * price + value: have 0 want 21000", R.INSUFFICIENT_FUNDS),
    ("reth", "intrinsic gas too low", R.INTRINSIC_GAS),
    ("reth", "exceeds block gas limit", R.GAS_LIMIT_EXCEEDED),
    ("reth", "txpool is full", R.POOL_FULL),
    ("reth", "invalid chain ID", R.CHAIN_ID),
    # anvil
    ("anvil", "nonce too low", R.NONCE_TOO_LOW),
    ("anvil", "transaction already imported", R.ALREADY_KNOWN),
    ("anvil", "max fee per gas less than block base fee", R.UNDERPRICED),
    ("anvil", "replacement transaction underpriced", R.REPLACEMENT_UNDERPRICED),
    ("anvil", "Insufficient funds for gas * price + value", R.INSUFFICIENT_FUNDS),
    ("anvil", "intrinsic gas too low", R.INTRINSIC_GAS),
    ("anvil", "intrinsic gas too high -- tx.gas_limit > env.block.gas_limit", R.GAS_LIMIT_EXCEEDED),
    ("anvil", "invalid chain id for signer", R.CHAIN_ID),
]
RAISED = {
    R.NONCE_TOO_LOW: NonceUsed,
    R.NONCE_TOO_HIGH: NotTakenNow,
    R.REPLACEMENT_UNDERPRICED: NonceUsed,
    R.UNDERPRICED: Underpriced,
    R.POOL_FULL: NotTakenNow,
    R.INSUFFICIENT_FUNDS: TransactionRefused,
    R.INTRINSIC_GAS: TransactionRefused,
    R.GAS_LIMIT_EXCEEDED: TransactionRefused,
    R.FEE_CAP_EXCEEDED: TransactionRefused,
    R.CHAIN_ID: TransactionRefused,
}


@pytest.mark.parametrize(
    ("name", "text", "expected"), TEXTS, ids=[f"{name}: {text}" for name, text, _ in TEXTS]
)
def test_refusal_is_classified_and_becomes_its_error(name, text, expected):
    assert classify(text) == expected
    if expected == R.ALREADY_KNOWN:
        raise_refusal("transaction 0x1", text, "http://node")
        return
    with pytest.raises(RAISED[expected]) as caught:
        raise_refusal("transaction 0x1", text, "http://node")
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, Underpriced) and any(digit in text for digit in "3"):
        assert caught.value.minimum_wei == 3


def test_every_class_is_known_of_every_client_that_has_it():
    clients = {name for name, _, _ in TEXTS}
    assert clients == {"geth", "erigon", "besu", "nethermind", "reth", "anvil"}
    common = set(R) - {R.NONCE_TOO_HIGH, R.FEE_CAP_EXCEEDED, R.POOL_FULL}
    for name in clients:
        assert {kind for client, _, kind in TEXTS if client == name} >= common, name


def test_unknown_refusal_is_shown_as_the_node_worded_it():
    assert classify("the moon is in the wrong house") is None
    with pytest.raises(
        TransactionRefused, match=r"http://node refuses it \(the moon is in the wrong house\)"
    ):
        raise_refusal("transaction 0x1", "the moon is in the wrong house", "http://node")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("transaction underpriced: gas tip cap 1, minimum needed 3", 3),
        (
            "FeeTooLow, MaxFeePerGas too low. MaxFeePerGas: 1, BaseFee: 7, MaxPriorityFeePerGas: 1",
            7,
        ),
        ("transaction underpriced", None),
    ],
)
def test_minimum_is_read_where_it_is_named(text, found):
    assert minimum_wei(text) == found


# ---- on a real chain, whose node wants more than it says


def refusing(
    monkeypatch, answers: dict[str, str] | None = None, minimum: int = 0, named: bool = True
) -> list[int]:
    """Let the node refuse transactions below `minimum` wei, as geth does; return the prices."""
    offered: list[int] = []
    ask, ask_all = Rpc._ask, Rpc.ask_all

    def asked(self, url, method, params):
        if method == "eth_sendRawTransaction":
            offered.append(price_of(params[0]))
            if offered[-1] < minimum:
                more = f": gas tip cap {offered[-1]}, minimum needed {minimum}" if named else ""
                error = {"code": -32000, "message": f"transaction underpriced{more}"}
                return {"jsonrpc": "2.0", "id": 1, "error": error}
        return ask(self, url, method, params)

    def asked_all(self, method, many):
        return (
            [None] * len(many)
            if method == "eth_sendRawTransaction"
            else ask_all(self, method, many)
        )

    monkeypatch.setattr(Rpc, "_ask", asked)
    monkeypatch.setattr(Rpc, "ask_all", asked_all)
    return offered


def price_of(raw: str) -> int:
    return int.from_bytes(rlp.decode(bytes.fromhex(raw.removeprefix("0x")))[1])


def rich(chain, account) -> None:
    chain.coordinator.web3.provider.make_request("anvil_setBalance", [account.address, hex(10**20)])


@pytest.fixture
def payer(chain):
    account = Account.create()
    rich(chain, account)
    return account


def bounded(chain, **changes) -> Coordinator:
    return Coordinator(chain.settings.chain.model_copy(update=changes))


def test_sender_raises_the_price_to_the_named_minimum_under_one_nonce(
    chain, tmp_path, monkeypatch, payer
):
    """An earlier version took this text for a used nonce, 32 times."""
    offered = refusing(monkeypatch, minimum=3)
    sender = Sender(chain.coordinator, payer, tmp_path / "journal.db")
    tx_hash = sender.send(chain.coordinator.register_peer("peer"))
    assert offered == [0, 3]
    assert chain.coordinator.wait_for_receipt(tx_hash, 10).succeeded
    assert chain.coordinator.nonce(payer.address) == 1
    assert sender.tend() == 0
    sender.close()


def test_sender_climbs_where_no_minimum_is_named(chain, tmp_path, monkeypatch, payer):
    offered = refusing(monkeypatch, minimum=100, named=False)
    client = bounded(chain, max_gas_price_gwei=1.0)
    sender = Sender(client, payer, tmp_path / "journal.db")
    sender.send(client.register_peer("peer"))
    assert offered[-1] >= 100
    assert len(offered) < 10
    sender.close()


def test_minimum_beyond_the_bound_is_reported_with_the_setting(chain, tmp_path, monkeypatch, payer):
    refusing(monkeypatch, minimum=3 * 10**9)
    client = bounded(chain, max_gas_price_gwei=2.0)
    sender = Sender(client, payer, tmp_path / "journal.db")
    with pytest.raises(TransactionRefused) as caught:
        sender.send(client.register_peer("peer"))
    for part in (
        "it wants at least 3000000000 wei",
        "2000000000 are allowed at most",
        "chain.max_gas_price_gwei",
    ):
        assert part in str(caught.value)
    assert sender.waiting() == []  # nothing half-written: the nonce is free
    sender.close()


def test_price_of_the_chain_beyond_the_bound_is_not_paid(chain, monkeypatch, payer):
    client = bounded(chain, max_gas_price_gwei=2.0)
    monkeypatch.setattr(Coordinator, "gas_price", lambda self: 5 * 10**9)
    with pytest.raises(TransactionRefused, match=r"asks for 5000000000 wei, .* allows 2000000000"):
        client.sign_and_send(payer, client.register_peer("peer"))


def test_keeper_s_own_transactions_are_raised_too(chain, monkeypatch):
    rich(chain, chain.owner)
    offered = refusing(monkeypatch, minimum=3)
    chain.send(chain.owner, chain.coordinator.advance_round(0))
    assert offered == [0, 3]
    assert chain.coordinator.current_round() == 1


def test_full_pool_keeps_the_transaction_for_later(chain, tmp_path, monkeypatch):
    account, is_full = Account.create(), [True]
    ask = Rpc._ask

    def asked(self, url, method, params):
        if method == "eth_sendRawTransaction" and is_full:
            return {
                "jsonrpc": "2.0",
                "id": 1,
                "error": {"code": -32000, "message": "txpool is full"},
            }
        return ask(self, url, method, params)

    monkeypatch.setattr(Rpc, "_ask", asked)
    sender = Sender(chain.coordinator, account, tmp_path / "journal.db")
    with pytest.raises(ChainUnreachable, match="does not take it now: transaction pool full"):
        sender.send(chain.coordinator.register_peer("peer"))
    (waiting,) = sender.waiting()
    is_full.clear()
    sender.tend()
    assert chain.coordinator.wait_for_receipt(waiting.hash, 10).succeeded
    sender.close()


def test_waiting_transaction_that_is_not_outbid_enough_is_outbid_next_time(
    chain, tmp_path, monkeypatch, payer
):
    """An earlier version raised the price once, and then offered the same forever."""
    client = bounded(chain, max_gas_price_gwei=1.0)
    sender = Sender(client, payer, tmp_path / "journal.db")
    monkeypatch.setattr(Sender, "_deliver", lambda self, entry: self._note_sent(entry))
    monkeypatch.setattr(Coordinator, "send_all_raw", lambda self, raws: [False] * len(raws))
    sender.send(client.register_peer("peer"))

    def not_enough(self, entry):
        raise client_module.ReplacementUnderpriced("used")

    monkeypatch.setattr(Sender, "_deliver", not_enough)
    monkeypatch.setattr("worker.chain.transaction_queue.STUCK_SECONDS", -1.0)
    prices = []
    for _ in range(3):
        sender.tend()
        prices.append(sender.waiting()[0].price_wei)
    assert prices == sorted(set(prices))
    sender.close()


def test_real_anvil_s_words_are_known(chain, anvil_binary, payer):
    client = chain.coordinator
    call = client.register_peer("peer")

    def refused(client: Coordinator = client, account=payer, **changes) -> ChainError:
        options = {
            "nonce": client.nonce(account.address),
            "gas": 300_000,
            "gas_price_wei": 1,
        } | changes
        with pytest.raises(ChainError) as caught:
            client.send_raw(client.sign(account, call, **options)[1])
        return caught.value

    assert "gas limit above what the chain allows" in str(refused(gas=10**12))
    assert "gas limit below what any such transaction costs" in str(refused(gas=10))
    assert "insufficient funds" in str(refused(account=Account.create()))
    chain.send(payer, client.register_peer("first"))
    assert isinstance(refused(nonce=0), NonceUsed)


def test_settings_of_a_bound_are_checked():
    with pytest.raises(SettingsError, match="max_gas_price_gwei"):
        settings.parse({"chain": {"max_gas_price_gwei": 0}}, "test")

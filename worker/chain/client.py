"""Client of an EVM chain over JSON-RPC: blocks, accounts, transactions.

coordinator.py is the client of the contract. Every method may raise ChainUnreachable (no answer in
time) and ChainError; those that execute a call may raise ContractRefused.
"""

import functools
import logging
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eth_account.signers.local import LocalAccount
from eth_typing import HexStr
from hexbytes import HexBytes
from web3 import Web3
from web3.exceptions import (
    BadFunctionCallOutput,
    BlockNotFound,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.types import TxParams

from worker import settings
from worker.chain.contract import refusal
from worker.chain.deployment import Deployment, connect, proxy_url, resolve, translated
from worker.chain.refusals import Refusal, classify, minimum_wei
from worker.chain.rpc import CHECK_ADDRESS, Rpc, is_revert
from worker.errors import BadAnswer, ChainError, ChainUnreachable, ContractRefused, WorkerError
from worker.log import printable

log = logging.getLogger(__name__)

_NO_ANSWER = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""Errors that web3 raises for JSON-RPC answers in an unexpected form."""
_PRICE_LIMIT = 5
"""Limit of prices if the settings have none, as a multiple of the chain's price."""
_GAS_MARGIN = 1.25
"""Factor on gas estimates: a reward that another peer submits meanwhile adds to the cost."""


class NonceUsed(ChainError):
    """Another transaction of the account, mined or pending, has this nonce; read it again."""


class ReplacementUnderpriced(NonceUsed):
    """A pending transaction of the account has this nonce and pays at least as much."""


class Underpriced(ChainError):
    """The node requires a higher gas price; `minimum_wei` if it names one."""

    def __init__(
        self,
        message: str,
        minimum_wei: int | None,
    ) -> None:
        super().__init__(message)
        self.minimum_wei = minimum_wei


class TransactionRefused(ChainError):
    """The node refuses the transaction and would refuse it again unchanged."""


class NotTakenNow(ChainUnreachable):
    """The node can't accept the transaction yet: its pool is full, or earlier ones are missing."""


class Unanswered(BadAnswer):
    """The contract lacks the view that was called, or the node's state of it is wrong."""


class ReceiptTimeout(ChainError):
    """The transaction was not mined in time; it may still be mined, or be lost."""


@dataclass(frozen=True, slots=True)
class Call:
    """A write that is not signed yet. `to` None creates a contract from `data`."""

    name: str
    data: bytes
    to: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A mined transaction. `contract` is the address that it created; None: it created none."""

    tx_hash: str
    block: int
    succeeded: bool
    gas_used: int
    contract: str | None


class ChainClient:
    """Client of the chain in the settings. The first call locates the chain."""

    def __init__(self, chain: settings.Chain) -> None:
        self._chain = chain
        self._deployment: Deployment | None = None
        self._web3: Web3 | None = None

    @property
    def deployment(self) -> Deployment:
        """The JSON-RPC address, chain id and contract in use."""
        if self._deployment is None:
            self._deployment = resolve(self._chain)
        return self._deployment

    @property
    def web3(self) -> Web3:
        """The raw client, for other calls than this class has. Wrap its calls in `translated`."""
        if self._web3 is None:
            self._web3 = connect(self.rpc, self._chain.timeout_seconds)
        return self._web3

    @functools.cached_property
    def rpc(self) -> Rpc:
        """The JSON-RPC addresses in use."""
        chain = self._chain
        if chain.rpc_url:
            key = "chain.rpc_url"
        elif chain.deployment_file:
            key = "chain.deployment_file"
        else:
            key = "chain.account_url"
        urls, token_file = self.deployment.rpc_urls, None
        if chain.account_url is not None and urls == (proxy_url(chain.account_url),):
            token_file = chain.account_token_file  # no other server may see it
        return Rpc(urls, key, self.deployment.chain_id, chain.timeout_seconds, token_file)

    def check_id(self) -> None:
        """Verify the chain id of all addresses; those of another chain are not used."""
        self.rpc.survey()

    def has_code(
        self,
        address: str,
        block: int | None = None,
    ) -> bool:
        """Return whether there is a contract at the address, in the given or the latest block."""
        checksummed = Web3.to_checksum_address(address)
        with self.translated("eth_getCode"):
            return len(self.web3.eth.get_code(checksummed, block)) > 0

    @contextmanager
    def translated(self, subject: str) -> Iterator[None]:
        """Translate web3's exceptions about `subject` (a call's name) into errors of hivewright."""
        with translated(self._rpc_source, self._chain.timeout_seconds):
            try:
                yield
            except ContractLogicError as error:
                raise refusal(subject, error.data, error.message, self._kind_of_contract) from None
            except BadFunctionCallOutput:
                contract = self.deployment.contract
                raise Unanswered(
                    f"{subject}: {contract} on {self._rpc_source} does not answer like a swarm"
                    f" coordinator{self._kind_of_contract}; check chain.contract and chain.rpc_url"
                ) from None
            except Web3RPCError as error:
                # Some nodes' messages of reverts do not begin as web3 expects.
                if is_revert(rpc_message(error)):
                    raise refusal(
                        subject, _revert_data(error), rpc_message(error), self._kind_of_contract
                    ) from None
                raise
            except (WorkerError, Web3Exception):
                raise
            except _NO_ANSWER as error:
                what = printable(f"{type(error).__name__}: {error}")[:200]
                raise BadAnswer(
                    f"{subject}: {self._rpc_source} gives an answer in an unexpected form ({what});"
                    f" {CHECK_ADDRESS}"
                ) from error

    def block_number(self) -> int:
        with self.translated("eth_blockNumber"):
            return int(self.web3.eth.block_number)

    def block_time(self, block: int) -> float:
        """Return the time of the block, in seconds since 1970."""
        with self.translated("eth_getBlockByNumber"):
            return float(self.web3.eth.get_block(block)["timestamp"])

    def block_hash(self, block: int) -> str | None:
        """Return the hash of the block with this number; None if it is unknown or pruned.

        After a reorganisation another block, with another hash, has the number.
        """
        with self.translated("eth_getBlockByNumber"):
            try:
                return Web3.to_hex(self.web3.eth.get_block(block)["hash"])
            except BlockNotFound:
                return None

    # ---- transactions

    def nonce(self, address: str) -> int:
        """Return the number of mined transactions: the first free nonce if none is pending."""
        with self.translated("eth_getTransactionCount"):
            return int(
                self.web3.eth.get_transaction_count(Web3.to_checksum_address(address), "latest")
            )

    def gas_price(self) -> int:
        """Return the chain's current gas price in wei."""
        with self.translated("eth_gasPrice"):
            return int(self.web3.eth.gas_price)

    def estimate_gas(
        self,
        sender: str,
        call: Call,
    ) -> int:
        """Return the gas limit for the call, including a margin.

        Raises ContractRefused if the contract would refuse the call now.
        """
        with self.translated(call.name):
            estimate = self.web3.eth.estimate_gas(_transaction(sender, call))
            return int(estimate * _GAS_MARGIN)

    def estimate_all(
        self,
        sender: str,
        calls: Sequence[Call],
    ) -> list[int | WorkerError]:
        """Estimate gas for many calls in one request; for a call that fails, return its error."""
        asked = []
        for call in calls:
            data = "0x" + call.data.hex()
            asked.append([{"from": sender, "to": call.to, "data": data}])
        answers = self.rpc.ask_all("eth_estimateGas", asked)
        estimates: list[int | WorkerError] = []
        for call, answer in zip(calls, answers, strict=True):
            if answer is not None:
                estimates.append(int(int(answer, 16) * _GAS_MARGIN))
            elif estimates and isinstance(estimates[-1], ChainUnreachable):
                estimates.append(estimates[-1])  # do not wait again for each call
            else:
                try:
                    estimates.append(self.estimate_gas(sender, call))
                except WorkerError as error:
                    estimates.append(error)
        return estimates

    def sign(
        self,
        account: LocalAccount,
        call: Call,
        *,
        nonce: int,
        gas: int,
        gas_price_wei: int,
    ) -> tuple[str, bytes]:
        """Return transaction hash and raw transaction, without sending it.

        It uses the oldest transaction format, which every chain accepts.
        """
        transaction: dict[str, Any] = {
            "chainId": self.deployment.chain_id,
            "nonce": nonce,
            "gas": gas,
            "gasPrice": gas_price_wei,
            "value": 0,
            "data": call.data,
        }
        if call.to is not None:
            transaction["to"] = call.to
        signed = account.sign_transaction(transaction)
        return Web3.to_hex(signed.hash), bytes(signed.raw_transaction)

    def send_raw(self, raw: bytes) -> None:
        """Send a signed transaction to the chain; one that the chain already has is a success.

        Raises NonceUsed if the account used the nonce for another transaction, Underpriced if its
        price is too low, NotTakenNow if the chain may accept it unchanged later, TransactionRefused
        if it never will.
        """
        with self.translated("eth_sendRawTransaction"):
            try:
                self.web3.eth.send_raw_transaction(raw)
            except Web3RPCError as error:
                self._accept_if_known(Web3.keccak(raw), error)

    def send_all_raw(
        self,
        raws: Sequence[bytes],
    ) -> list[bool]:
        """Send signed transactions in one request, in order; return which of them were accepted.

        The result of the others is unknown; `send_raw` finds it.
        """
        asked = [["0x" + raw.hex()] for raw in raws]
        answers = self.rpc.ask_all("eth_sendRawTransaction", asked)
        hashes = [Web3.to_hex(Web3.keccak(raw)) for raw in raws]
        return list(map(operator.eq, answers, hashes))

    def sign_and_send(
        self,
        account: LocalAccount,
        call: Call,
        nonce: int | None = None,
    ) -> str:
        """Send the call from the account and return the transaction's hash.

        Only for accounts with a single sender. `nonce` None: the next one by the chain's count.
        Sending the same call again before it is mined repeats the transaction, and makes no second.
        """
        gas = self.estimate_gas(account.address, call)
        if nonce is None:
            nonce = self.nonce(account.address)
        price_wei = self.allowed_price()
        while True:
            tx_hash, raw = self.sign(account, call, nonce=nonce, gas=gas, gas_price_wei=price_wei)
            try:
                self.send_raw(raw)
            except Underpriced as refused:
                price_wei = self.raised_price(price_wei, refused)
            else:
                return tx_hash

    def allowed_price(self) -> int:
        """Return the chain's current gas price in wei.

        Raises TransactionRefused if it exceeds the bound in the settings.
        """
        price_wei, limit_wei = self.gas_price(), self._limit_of_settings()
        if limit_wei is not None and price_wei > limit_wei:
            raise TransactionRefused(
                f"eth_gasPrice: {self._rpc_source} asks for {price_wei} wei,"
                f" chain.max_gas_price_gwei allows {limit_wei}; wait for a lower price, or raise"
                " the setting"
            )
        return price_wei

    def price_limit(self, asked_wei: int) -> int:
        """Return the highest price to offer, in wei, when the chain asks for `asked_wei`."""
        limit_wei = self._limit_of_settings()
        return _PRICE_LIMIT * asked_wei if limit_wei is None else limit_wei

    def raised_price(
        self,
        price_wei: int,
        refused: Underpriced,
    ) -> int:
        """Return the price to try after `price_wei` was refused.

        Raises TransactionRefused if the bound is reached.
        """
        asked_wei = max(self.gas_price(), refused.minimum_wei or 0)
        limit_wei = self.price_limit(asked_wei)
        wanted_wei = asked_wei if asked_wei > price_wei else 2 * price_wei + 1
        if refused.minimum_wei is None and price_wei < limit_wei:
            wanted_wei = min(wanted_wei, limit_wei)
        if wanted_wei > limit_wei:
            minimum = "more than it says"
            if refused.minimum_wei is not None:
                minimum = f"at least {refused.minimum_wei} wei"
            raise TransactionRefused(
                f"{refused}: it wants {minimum}, {price_wei} wei were offered and {limit_wei} are"
                " allowed at most; raise chain.max_gas_price_gwei"
            )
        log.info("gas price raised from_wei=%d to_wei=%d", price_wei, wanted_wei)
        return wanted_wei

    def receipt(self, tx_hash: str) -> Receipt | None:
        """Return the transaction's receipt; None while it is not mined (or if it was lost)."""
        with self.translated("eth_getTransactionReceipt"):
            try:
                raw = self.web3.eth.get_transaction_receipt(HexStr(tx_hash))
            except TransactionNotFound:
                return None
            return Receipt(
                tx_hash=tx_hash,
                block=int(raw["blockNumber"]),
                succeeded=raw["status"] == 1,
                gas_used=int(raw["gasUsed"]),
                contract=raw.get("contractAddress"),
            )

    def wait_for_receipt(
        self,
        tx_hash: str,
        timeout_seconds: float,
    ) -> Receipt:
        """Wait until the transaction is mined. Raises ReceiptTimeout."""
        deadline = time.monotonic() + timeout_seconds
        pause = 0.02
        while (receipt := self.receipt(tx_hash)) is None:
            if time.monotonic() > deadline:
                raise ReceiptTimeout(
                    f"transaction {tx_hash}: not mined within {timeout_seconds:g} s; see whether"
                    " the chain makes blocks"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        return receipt

    def transact(
        self,
        account: LocalAccount,
        call: Call,
        timeout_seconds: float,
        nonce: int | None = None,
    ) -> Receipt:
        """Send the call, wait until it is mined, and return its receipt.

        Raises ContractRefused if it was mined but reverted, ReceiptTimeout if it was not mined in
        time.
        """
        tx_hash = self.sign_and_send(account, call, nonce)
        receipt = self.wait_for_receipt(tx_hash, timeout_seconds)
        if not receipt.succeeded:
            self.estimate_gas(account.address, call)  # raises the reason, if it persists
            raise ContractRefused(
                "", f"{call.name}: transaction {receipt.tx_hash} reverted; send it again"
            )
        return receipt

    # ----

    @property
    def _kind_of_contract(self) -> str:
        """A description of the contract for messages; empty if nothing is known."""
        return ""

    def _limit_of_settings(self) -> int | None:
        gwei = self._chain.max_gas_price_gwei
        return None if gwei is None else int(gwei * 10**9)

    @property
    def _rpc_source(self) -> str:
        return self.rpc.source

    def _accept_if_known(
        self,
        tx_hash: HexBytes,
        error: Web3RPCError,
    ) -> None:
        """Return if the chain has the transaction; otherwise raise the error that `error` means.

        Nodes word "already known" differently, so the chain is asked for the transaction itself.
        """
        try:
            self.web3.eth.get_transaction(tx_hash)
            return
        except TransactionNotFound:
            pass
        raise_refusal(f"transaction {Web3.to_hex(tx_hash)}", rpc_message(error), self._rpc_source)


_ADVICE = {
    Refusal.INSUFFICIENT_FUNDS: "send the account that pays for transactions some money",
    Refusal.INTRINSIC_GAS: "the gas estimate of chain.rpc_url is wrong; use another node",
    Refusal.GAS_LIMIT_EXCEEDED: "the chain takes no transaction that large; use another chain",
    Refusal.FEE_CAP_EXCEEDED: (
        "lower chain.max_gas_price_gwei, or use a node that lets higher fees through"
    ),
    Refusal.CHAIN_ID: "make chain.id the id of the chain at chain.rpc_url",
}


def raise_refusal(
    subject: str,
    text: str,
    source: str,
) -> None:
    """Raise the error for a node's refusal of a transaction; return if the node already has it."""
    kind, said = classify(text), printable(text)[:200]
    match kind:
        case Refusal.ALREADY_KNOWN:
            return
        case Refusal.NONCE_TOO_LOW:
            raise NonceUsed(f"{subject}: its nonce is used; read the account's nonce again")
        case Refusal.REPLACEMENT_UNDERPRICED:
            raise ReplacementUnderpriced(
                f"{subject}: its nonce is used by one that waits; read the nonce again"
            )
        case Refusal.UNDERPRICED:
            raise Underpriced(
                f"{subject}: {source} refuses its gas price ({said})", minimum_wei(text)
            )
        case Refusal.POOL_FULL | Refusal.NONCE_TOO_HIGH:
            raise NotTakenNow(
                f"{subject}: {source} does not take it now: {kind.value} ({said}); it is sent again"
            )
        case None:
            raise TransactionRefused(
                f"{subject}: {source} refuses it ({said}); check that this is the right chain"
            )
    raise TransactionRefused(
        f"{subject}: {source} refuses it: {kind.value} ({said}); {_ADVICE[kind]}"
    )


def rpc_message(error: Web3RPCError) -> str:
    """Return the message of the JSON-RPC error, followed by its data if that is text."""
    said = _error_object(error)
    if not isinstance(said, dict):
        return str(said or error.message)
    message, data = said.get("message"), said.get("data")
    if isinstance(data, str) and not data.startswith("0x"):
        return f"{message} {data}"
    return str(message)


def _error_object(error: Web3RPCError) -> object:
    return error.rpc_response.get("error") if error.rpc_response else None


def _revert_data(error: Web3RPCError) -> object:
    said = _error_object(error)
    data = said.get("data") if isinstance(said, dict) else None
    # Some nodes prefix it.
    return data.removeprefix("Reverted ") if isinstance(data, str) else None


def _transaction(sender: str, call: Call) -> TxParams:
    transaction: TxParams = {
        "from": Web3.to_checksum_address(sender),
        "data": HexBytes(call.data),
    }
    if call.to is not None:
        transaction["to"] = Web3.to_checksum_address(call.to)
    return transaction

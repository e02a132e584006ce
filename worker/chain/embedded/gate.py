"""Filter JSON-RPC requests of untrusted callers, and their parameters.

The account service (/rpc) and the door in front of the embedded chain (door.py) use a `Gate`. It
forwards reads of the contract and signed transactions to it. Whatever could keep a chain busy (the
caller's own code, unlimited gas, logs of all blocks, state overrides) or grow it (new contracts) is
refused with a reason.
"""

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import rlp  # type: ignore[import-untyped]
from eth_account import Account
from eth_utils.abi import function_abi_to_4byte_selector
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from worker.chain.contract import coordinator_abi, market_abi
from worker.errors import ChainError
from worker.log import printable

NOT_SERVED, BAD_PARAMETERS, TOO_MANY, REJECTED = -32601, -32602, -32005, -32003
MAX_BATCH = 20
CALL_GAS = 50_000_000
"""Gas limit of one eth_call: 0.1 s of a core, and five times the need of reading 1,000 peers."""
SEND_GAS = 30_000_000
MAX_LOG_BLOCKS = 10_000
MAX_RAW_BYTES = 32 * 1024

_MAX_TOPICS = 64
_MAX_FEE_BLOCKS = 64
_MAX_PERCENTILES = 16
_LATEST_SECONDS = 1.0
_TAGS = frozenset({"earliest", "finalized", "latest", "pending", "safe"})
_FEES = frozenset(
    {"gasPrice", "maxFeePerGas", "maxPriorityFeePerGas", "nonce", "type", "value"},
)
_CALL_KEYS = _FEES | {"from", "to", "data", "input", "gas", "chainId"}
_FILTER_KEYS = frozenset({"address", "topics", "fromBlock", "toBlock", "blockHash"})


@dataclass(frozen=True, slots=True)
class _Form:
    """Positions of the fields in an RLP-encoded transaction, and their number."""

    chain_id: int
    nonce: int
    gas: int
    to: int
    data: int
    num_fields: int


_LEGACY = 0
_V = 6
"""Position of the legacy signature's `v`, which includes the chain id."""
# Values of _Form's fields, in their order, by the transaction's type.
_FORMS = {
    _LEGACY: _Form(_V, 0, 2, 3, 5, 9),
    1: _Form(0, 1, 3, 4, 6, 11),
    2: _Form(0, 1, 4, 5, 7, 12),
}


class NotPassed(ChainError):
    """The request is not forwarded to the chain: JSON-RPC error `code`, and why."""

    def __init__(
        self,
        code: int,
        reason: str,
    ) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class Passed:
    """A request to forward. `sender` and `nonce`: those of a transaction; otherwise None and 0."""

    method: str
    params: list[Any]
    sender: str | None = None
    nonce: int = 0


@dataclass
class Gate:
    """Filter for chain `chain_id`. `contract` None: any existing address may be called.

    `market` is a second contract that may be called; None: there is none. `latest` returns the
    number of the newest block; it is called only for open-ended block ranges.
    """

    chain_id: int
    contract: str | None
    latest: Callable[[], int]
    market: str | None = None
    _latest: tuple[float, int] = field(default=(0.0, 0), init=False)

    def check(
        self,
        method: str,
        params: object,
    ) -> Passed:
        """Return the request to forward. Raises NotPassed."""
        check = _CHECKS.get(method)
        if check is None:
            raise NotPassed(NOT_SERVED, f"{printable(method)}: not served here")
        if not isinstance(params, list):
            raise NotPassed(BAD_PARAMETERS, f"{method}: got params by name; expected a list")
        try:
            return check(self, method, params)
        except _Wrong as wrong:
            raise NotPassed(BAD_PARAMETERS, f"{method}: {wrong}") from None

    # ---- one for each kind of method; they raise _Wrong

    def _plain(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        return Passed(method, [])

    def _at_address(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 1, 2)
        address, *block = params
        return Passed(method, [_address(address), _block(block)])

    def _storage(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 2, 3)
        address, slot, *block = params
        target, digits = self._target(address), _hexadecimal(slot, 64)
        return Passed(method, [target, digits, _block(block)])

    def _call(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 1, 2)
        most = CALL_GAS if method == "eth_call" else SEND_GAS
        block = _block(params[1:])
        if block == "pending":
            block = "latest"  # anvil would execute a pending block again for each caller
        return Passed(method, [self._transaction(params[0], most), block])

    def _fee_history(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 2, 3)
        count = _quantity(params[0])
        if not 0 <= count <= _MAX_FEE_BLOCKS:
            raise _Wrong(f"got {count} blocks; expected at most {_MAX_FEE_BLOCKS}")
        percentiles = params[2] if len(params) > 2 else []
        if not isinstance(percentiles, list) or len(percentiles) > _MAX_PERCENTILES:
            raise _Wrong(f"expected a list of at most {_MAX_PERCENTILES} percentiles")
        for each in percentiles:
            if type(each) not in (int, float) or not 0 <= each <= 100:
                raise _Wrong("expected percentiles as numbers from 0 to 100")
        return Passed(method, [hex(count), _block(params[1:2]), percentiles])

    def _block_of(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 1, 2)
        is_full = params[1] if len(params) > 1 else False
        if not isinstance(is_full, bool):
            raise _Wrong("expected true or false as the second parameter")
        return Passed(method, [_block(params[:1]), is_full])

    def _by_hash(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 1, 1)
        return Passed(method, [_hash(params[0])])

    def _logs(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 1, 1)
        wanted = _object(params[0], _FILTER_KEYS)
        passed: dict[str, Any] = {}
        address = wanted.get("address")
        if isinstance(address, list):
            if len(address) != 1:
                raise _Wrong(f"got {len(address)} addresses; expected the contract's alone")
            address = address[0]
        if address is not None or self.contract is not None:
            passed["address"] = self.contract if address is None else self._target(address)
        if wanted.get("topics"):
            passed["topics"] = _topics(wanted["topics"])
        if wanted.get("blockHash") is not None:
            passed["blockHash"] = _hash(wanted["blockHash"])
            return Passed(method, [passed])
        first = self._number(wanted.get("fromBlock") or "latest")
        last = self._number(wanted.get("toBlock") or "latest")
        if last - first >= MAX_LOG_BLOCKS:
            count = last - first + 1
            raise _Wrong(f"got {count} blocks; expected at most {MAX_LOG_BLOCKS} at once")
        passed |= {"fromBlock": hex(first), "toBlock": hex(last)}
        return Passed(method, [passed])

    def _send(
        self,
        method: str,
        params: list[Any],
    ) -> Passed:
        _require_count(params, 1, 1)
        digits = _hexadecimal(params[0], 2 * MAX_RAW_BYTES)[2:]
        if len(digits) % 2:
            raise _Wrong("expected whole bytes, two digits for each")
        raw = bytes.fromhex(digits)
        chain_id, nonce, gas, to = _decoded(raw)
        if chain_id != self.chain_id:
            raise _Wrong(
                f"signed for chain id {chain_id}; this is chain {self.chain_id}: sign it for that"
            )
        if not to:
            raise _Wrong("creates a contract; expected a transaction to the swarm's contract")
        self._target("0x" + to.hex())
        if gas > SEND_GAS:
            raise _Wrong(f"gas is {gas}; expected at most {SEND_GAS}")
        try:
            sender = str(Account.recover_transaction(raw))
        except Exception:  # noqa: BLE001 - the exception depends on untrusted bytes
            raise _Wrong("the signature is invalid") from None
        return Passed(method, ["0x" + raw.hex()], sender, nonce)

    # ---- values

    def _target(self, value: object) -> str:
        address = _address(value)
        ours = [each.lower() for each in (self.contract, self.market) if each is not None]
        if self.contract is not None and address.lower() not in ours:
            raise _Wrong(f"address {address}; expected the swarm's contract {self.contract}")
        return address

    def _transaction(
        self,
        value: object,
        most_gas: int,
    ) -> dict[str, Any]:
        wanted = _object(value, _CALL_KEYS)
        if wanted.get("to") is None:
            raise _Wrong("no `to`; expected a call of the swarm's contract")
        chain_id = wanted.get("chainId")
        if chain_id is not None and _quantity(chain_id) != self.chain_id:
            raise _Wrong(
                f"chainId is {printable(str(chain_id))[:40]}; this is chain {self.chain_id}"
            )
        data = wanted.get("data")
        if data is None:
            data = wanted.get("input")
        data = _hexadecimal(data, None)
        selector = data[2:10].lower()
        if self.contract is not None and selector not in _selectors():
            raise _Wrong(f"{data[:10]} is not a function of the swarm's contract")
        passed = {"to": self._target(wanted["to"]), "data": data}
        if wanted.get("from") is not None:
            passed["from"] = _address(wanted["from"])
        gas = most_gas
        if wanted.get("gas") is not None:
            gas = min(_quantity(wanted["gas"]), most_gas)
        passed["gas"] = hex(gas)
        for key in _FEES:
            if wanted.get(key) is not None:
                passed[key] = hex(_quantity(wanted[key]))
        return passed

    def _number(self, block: object) -> int:
        text = _block([block])
        if text == "earliest":
            return 0
        if text not in _TAGS:
            return int(text, 16)
        read_at, number = self._latest
        if time.monotonic() - read_at > _LATEST_SECONDS:
            number = self.latest()
            self._latest = (time.monotonic(), number)
        return number


class _Wrong(Exception):
    """The parameters are invalid; the message says why."""


_Check = Callable[[Gate, str, list[Any]], Passed]
_CHECKS: dict[str, _Check] = {
    "eth_blockNumber": Gate._plain,
    "eth_call": Gate._call,
    "eth_chainId": Gate._plain,
    "eth_estimateGas": Gate._call,
    "eth_feeHistory": Gate._fee_history,
    "eth_gasPrice": Gate._plain,
    "eth_getBalance": Gate._at_address,
    "eth_getBlockByHash": Gate._block_of,
    "eth_getBlockByNumber": Gate._block_of,
    "eth_getCode": Gate._at_address,
    "eth_getLogs": Gate._logs,
    "eth_getStorageAt": Gate._storage,
    "eth_getTransactionByHash": Gate._by_hash,
    "eth_getTransactionCount": Gate._at_address,
    "eth_getTransactionReceipt": Gate._by_hash,
    "eth_maxPriorityFeePerGas": Gate._plain,
    "eth_sendRawTransaction": Gate._send,
    "net_version": Gate._plain,
    "web3_clientVersion": Gate._plain,
}
METHODS = frozenset(_CHECKS)
"""Methods that are forwarded: reads, and signed transactions. anvil offers many more."""


@functools.cache
def _selectors() -> frozenset[str]:
    """Return the selectors of all functions of the contracts; calls change nothing."""
    return frozenset(
        function_abi_to_4byte_selector(entry).hex()
        for entry in (*coordinator_abi(), *market_abi())
        if entry["type"] == "function"
    )


def _decoded(raw: bytes) -> tuple[int | None, int, int, bytes]:
    """Return chain id (None: it has none), nonce, gas and receiver of a signed transaction."""
    kind = raw[0] if raw and raw[0] < 0x80 else _LEGACY
    form = _FORMS.get(kind)
    if form is None:
        raise _Wrong(f"a transaction of type {kind}; expected 0, 1 or 2")
    try:
        items = rlp.decode(raw[1:] if kind else raw)
    except RLPException:
        items = None
    if not isinstance(items, list) or len(items) != form.num_fields:
        raise _Wrong("no signed transaction")
    chain_id, nonce, gas = items[form.chain_id], items[form.nonce], items[form.gas]
    to, data = items[form.to], items[form.data]
    for part in (chain_id, nonce, gas, to, data):
        if not isinstance(part, bytes):
            raise _Wrong("no signed transaction")
    number: int | None = int.from_bytes(chain_id)
    if kind == _LEGACY:
        v = int.from_bytes(chain_id)
        number = (v - 35) // 2 if v >= 35 else None  # EIP-155
    return number, int.from_bytes(nonce), int.from_bytes(gas), to


def _require_count(
    params: list[Any],
    least: int,
    most: int,
) -> None:
    if not least <= len(params) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise _Wrong(f"got {len(params)} parameters; expected {expected}")


def _object(
    value: object,
    known: frozenset[str],
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong("expected an object")
    for key in value:
        if key not in known:
            raise _Wrong(f"{printable(str(key))[:40]} is not accepted here")
    return value


def _hexadecimal(value: object, most_digits: int | None) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"0x[0-9a-fA-F]*", value):
        raise _Wrong(f"got {printable(repr(value))[:40]}; expected a hexadecimal number, 0x...")
    if most_digits is not None and len(value) - 2 > most_digits:
        raise _Wrong(f"got {len(value) - 2} digits; expected at most {most_digits}")
    return value


def _quantity(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**256:
        return value
    return int(_hexadecimal(value, 64)[2:] or "0", 16)


def _address(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"0x[0-9a-fA-F]{40}", value):
        raise _Wrong(f"got {printable(repr(value))[:60]}; expected an address")
    return value


def _hash(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"0x[0-9a-fA-F]{64}", value):
        raise _Wrong(f"got {printable(repr(value))[:80]}; expected a hash")
    return value


def _block(values: list[Any]) -> str:
    """Return the block in the last parameter; "latest" if that is missing."""
    if not values:
        return "latest"
    if isinstance(values[0], str) and values[0] in _TAGS:
        return values[0]
    block = _hexadecimal(values[0], 64)
    if block == "0x":
        raise _Wrong("got 0x; expected a block")
    return block


def _topics(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > 4:
        raise _Wrong("expected at most 4 topics")
    for topic in value:
        alternatives = topic if isinstance(topic, list) else [topic]
        if len(alternatives) > _MAX_TOPICS:
            raise _Wrong(f"expected at most {_MAX_TOPICS} alternatives for a topic")
        for each in alternatives:
            if each is not None:
                _hash(each)
    return value

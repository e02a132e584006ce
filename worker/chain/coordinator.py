"""Client of the swarm coordinator contract: ours, or a foreign one with the same ABI, on any EVM JSON-RPC.

Reads are typed methods of `Coordinator`; writes are `Call`s built without any network and sent by whoever owns the key
(`sign_and_send`, or the queue of chain/sender.py). Every method may raise ChainUnreachable (no answer in time) and
ChainError; reads and sends may raise ContractRefused.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from eth_account.signers.local import LocalAccount
from eth_typing import ChecksumAddress, HexStr
from hexbytes import HexBytes
from web3 import Web3
from web3.contract import Contract
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.types import TxParams

from worker import settings
from worker.chain import connection, contract
from worker.chain.contract import NO_ADDRESS, coordinator_abi, refusal
from worker.chain.rpc import Rpc
from worker.errors import ChainError, ContractRefused

log = logging.getLogger(__name__)

# submitReward has two overloads, and by name web3 would pick uint256: always the signature.
_SUBMIT_REWARD = "submitReward(uint256,uint256,int256,string)"
_LOG_BLOCKS = 10_000
"""Blocks of one eth_getLogs: what public nodes commonly allow."""
_GAS_MARGIN = 1.25
"""Gas is estimated on the state of now and spent on a later one: a reward that came in between costs a little more."""


class NonceUsed(ChainError):
    """The account has another transaction with this nonce, mined or waiting; read the nonce again."""


class ReceiptTimeout(ChainError):
    """The transaction was not mined in time; it may still be, or be lost."""


@dataclass(frozen=True, slots=True)
class Call:
    """One write, not yet signed. `to` None creates a contract from `data`."""

    name: str
    data: bytes
    to: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A mined transaction. `contract` is the address that it created, if it created one."""

    tx_hash: str
    block: int
    succeeded: bool
    gas_used: int
    contract: str | None


@dataclass(frozen=True, slots=True)
class Event:
    """One log entry of the contract, decoded."""

    name: str
    arguments: dict[str, Any]
    block: int
    tx_hash: str


class Coordinator:
    """The contract that keeps a swarm's books. Making one sends nothing; the first call finds out where it is."""

    def __init__(self, chain: settings.Chain) -> None:
        self._chain = chain
        self._deployment: connection.Deployment | None = None
        self._web3: Web3 | None = None
        self._checked = False
        self._abi = Web3().eth.contract(abi=coordinator_abi())
        self.version: str | None = None
        """What our contract calls itself ("hivewright/2"); None before `check`, and for a foreign contract."""

    # ---- connection

    @property
    def deployment(self) -> connection.Deployment:
        """JSON-RPC address, chain id and contract in use."""
        if self._deployment is None:
            self._deployment = connection.resolve(self._chain)
        return self._deployment

    @property
    def web3(self) -> Web3:
        """The raw client, for what this class does not offer. Wrap its calls in `translated`."""
        if self._web3 is None:
            self._web3 = connection.connect(self.rpc, self._chain.timeout_seconds)
        return self._web3

    @functools.cached_property
    def rpc(self) -> Rpc:
        """The JSON-RPC addresses in use."""
        chain = self._chain
        key = "rpc_url" if chain.rpc_url else "deployment_file" if chain.deployment_file else "account_url"
        deployment = self.deployment
        return Rpc(deployment.rpc_urls, f"chain.{key}", deployment.chain_id, chain.timeout_seconds)

    def check(self) -> None:
        """Make sure that the chain has the expected id and the contract code; find out whose contract it is."""
        self.check_id()
        if not self.has_code(self._address):
            raise ChainError(
                f"no contract at {self._address} on chain {self.deployment.chain_id} ({self._rpc_source}); "
                "check chain.contract, or run `hivewright chain deploy`"
            )
        self.version = self._own_version()
        self._checked = True
        log.info(
            "chain connected rpc=%s chain_id=%d contract=%s implementation=%s",
            ",".join(self.deployment.rpc_urls), self.deployment.chain_id, self._address, self.version or "foreign",
        )  # fmt: skip

    def check_id(self) -> None:
        """Make sure that the chain is the one that the settings name. Addresses of another one are not used."""
        self.rpc.survey()

    def has_code(self, address: str) -> bool:
        """Whether there is a contract at the address."""
        with self.translated("eth_getCode"):
            return len(self.web3.eth.get_code(Web3.to_checksum_address(address))) > 0

    def ensure_checked(self) -> None:
        """`check`, unless it has passed before."""
        if not self._checked:
            self.check()

    @contextmanager
    def translated(self, subject: str) -> Iterator[None]:
        """Turn what web3 raises about `subject` (a call's name) into errors of our own."""
        with connection.translated(self._rpc_source, self._chain.timeout_seconds):
            try:
                yield
            except ContractLogicError as error:
                raise refusal(subject, error.data, error.message) from None
            except BadFunctionCallOutput:
                raise ChainError(
                    f"{subject}: {self._address} on {self._rpc_source} does not answer like a swarm coordinator; "
                    "check chain.contract and chain.rpc_url"
                ) from None

    # ---- reads

    def read(self, signature: str, *arguments: Any) -> Any:
        """Call any view of the contract by its signature, such as `getTotalWins(string)`."""
        self.ensure_checked()
        return self._read(signature, *arguments)

    def current_round(self) -> int:
        return int(self.read("currentRound()"))

    def current_stage(self) -> int:
        return int(self.read("currentStage()"))

    def bootnodes(self) -> list[str]:
        """Multiaddrs, in the contract's order. They are strangers' text: parse before use."""
        return list(self.read("getBootnodes()"))

    def owner_of(self, peer_id: str) -> str | None:
        """The account that registered the peer, None if nobody did."""
        (owner,) = self.read("getEoa(string[])", [peer_id])
        return None if owner == NO_ADDRESS else str(owner)

    def registered(self, peer_ids: Sequence[str]) -> set[str]:
        """Those of the peers that somebody registered."""
        owners = self.read("getEoa(string[])", list(peer_ids)) if peer_ids else ()
        return {peer_id for peer_id, owner in zip(peer_ids, owners, strict=True) if owner != NO_ADDRESS}

    def peers_of(self, account: str) -> list[str]:
        """Peer ids that the account registered."""
        (peers,) = self.read("getPeerId(address[])", [Web3.to_checksum_address(account)])
        return list(peers)

    def total_rewards(self, peer_ids: Sequence[str]) -> list[int]:
        """Sum of all rewards of each peer, in milli-rewards."""
        return [int(reward) for reward in self.read("getTotalRewards(string[])", list(peer_ids))]

    def total_wins(self, peer_id: str) -> int:
        return int(self.read("getTotalWins(string)", peer_id))

    def winner_leaderboard(self, start: int, end: int) -> list[tuple[str, int]]:
        """Peers on the places `start` to `end` (not included) with their wins, best first."""
        peers, wins = self.read("winnerLeaderboard(uint256,uint256)", start, end)
        return list(zip(peers, wins, strict=True))

    def votes(self, round: int, peer_id: str) -> list[str]:
        """Whom the peer voted for; empty if it has not voted."""
        return list(self.read("getVoterVotes(uint256,string)", round, peer_id))

    def has_voted(self, round: int, peer_id: str) -> bool:
        return bool(self.votes(round, peer_id))

    def submitted_reward(self, round: int, stage: int, peer_id: str) -> int | None:
        """The reward that the chain has for (round, stage, peer), None if it has none."""
        self.ensure_checked()
        if self.version is not None:
            submitted, reward = self._read("getPeerReward(uint256,uint256,string)", round, stage, peer_id)
            return int(reward) if submitted else None
        # A foreign contract keeps rewards by account; what one peer submitted only stands in the log.
        owner = self.owner_of(peer_id)
        has_submitted = "hasSubmittedRoundStageReward(uint256,uint256,address)"
        if owner is None or not self._read(has_submitted, round, stage, owner):
            return None
        filters = {"account": owner, "roundNumber": round, "stageNumber": stage}
        for event in self.events("RewardSubmitted", filters, newest_first=True):
            if event.arguments["peerId"] == peer_id:
                return int(event.arguments["reward"])
        return None

    def has_role(self, role: str, account: str) -> bool:
        """Whether the account has OWNER_ROLE, BOOTNODE_MANAGER_ROLE or STAGE_MANAGER_ROLE."""
        return bool(self.read("hasRole(bytes32,address)", Web3.keccak(text=role), Web3.to_checksum_address(account)))

    def block_number(self) -> int:
        with self.translated("eth_blockNumber"):
            return int(self.web3.eth.block_number)

    def block_time(self, block: int) -> float:
        """When the block was made, in seconds since 1970."""
        with self.translated("eth_getBlockByNumber"):
            return float(self.web3.eth.get_block(block)["timestamp"])

    def events(
        self,
        name: str,
        filters: dict[str, Any] | None = None,
        *,
        from_block: int = 0,
        to_block: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Event]:
        """The contract's log entries of one name, `filters` by indexed arguments. `to_block` None: up to the latest.

        Asks for pieces of 10,000 blocks, as public nodes want it; end the iteration early where possible.
        """
        self.ensure_checked()
        event = self._contract.events[name]()
        to_block = self.block_number() if to_block is None else to_block
        for first, last in _pieces(from_block, to_block, newest_first):
            with self.translated(f"eth_getLogs of {name}"):
                found = event.get_logs(filters or {}, from_block=first, to_block=last)
            for entry in reversed(found) if newest_first else found:
                yield Event(name, dict(entry["args"]), int(entry["blockNumber"]), Web3.to_hex(entry["transactionHash"]))

    # ---- writes: built here, sent by whoever owns the key

    def call(self, signature: str, *arguments: Any) -> Call:
        """Any write of the contract by its signature, such as `registerPeer(string)`."""
        name, _, types = signature.removesuffix(")").partition("(")
        # By eth_abi itself: web3 takes ten times as long to find the function in the ABI.
        data = _selector(signature) + encode(types.split(",") if types else [], arguments)
        return Call(name, data, self.deployment.contract)

    def register_peer(self, peer_id: str) -> Call:
        return self.call("registerPeer(string)", peer_id)

    def submit_reward(self, round: int, stage: int, reward: int, peer_id: str, digest: str | None = None) -> Call:
        """`reward` in milli-rewards: round(1000 x mean reward of the peer's own groups in that round).

        `digest` (32 bytes, hexadecimal) of the signed groups follows the arguments: no contract reads it, but who
        audits the reward finds it in the transaction (docs/decisions/0015).
        """
        call = self.call(_SUBMIT_REWARD, round, stage, reward, peer_id)
        return call if digest is None else replace(call, data=call.data + bytes.fromhex(digest))

    def reward_digest(self, tx_hash: str) -> str | None:
        """The digest that came with a submitted reward; None if none did, or the transaction is not known any more."""
        with self.translated("eth_getTransactionByHash"):
            try:
                data = bytes(self.web3.eth.get_transaction(HexStr(tx_hash))["input"])
            except TransactionNotFound:
                return None
        try:
            _, arguments = self._abi.decode_function_input(data)
            call = self.call(_SUBMIT_REWARD, *arguments.values())
        except (Web3Exception, DecodingError, ValueError):
            return None  # not sent by a node: by a contract, say
        rest = data.removeprefix(call.data)
        return rest.hex() if len(rest) == 32 and data.startswith(call.data) else None

    def submit_winners(self, round: int, winners: Sequence[str], peer_id: str) -> Call:
        return self.call("submitWinners(uint256,string[],string)", round, list(winners), peer_id)

    def add_bootnodes(self, multiaddrs: Sequence[str]) -> Call:
        return self.call("addBootnodes(string[])", list(multiaddrs))

    def remove_bootnode(self, index: int) -> Call:
        """On any contract. The last bootnode takes the removed one's place, so read the list again afterwards."""
        return self.call("removeBootnode(uint256)", index)

    def withdraw_bootnode(self, multiaddr: str) -> Call:
        """On our contract only: remove a bootnode by its text, wherever it stands."""
        return self.call("withdrawBootnode(string)", multiaddr)

    def update_stage_and_round(self) -> Call:
        return self.call("updateStageAndRound()")

    def advance_round(self, expected_round: int) -> Call:
        """On our contract only: refused (RoundMovedOn) unless the round still is `expected_round`."""
        return self.call("advanceRound(uint256)", expected_round)

    # ---- sending

    def nonce(self, address: str) -> int:
        """How many transactions of the account are mined: the first free nonce if none is waiting."""
        with self.translated("eth_getTransactionCount"):
            return int(self.web3.eth.get_transaction_count(Web3.to_checksum_address(address), "latest"))

    def gas_price(self) -> int:
        """What the chain asks for now, in wei."""
        with self.translated("eth_gasPrice"):
            return int(self.web3.eth.gas_price)

    def estimate_gas(self, sender: str, call: Call) -> int:
        """Gas limit for the call, margin included. Raises ContractRefused if the contract would refuse it now."""
        transaction: TxParams = {"from": Web3.to_checksum_address(sender), "data": HexBytes(call.data)}
        if call.to is not None:
            transaction["to"] = Web3.to_checksum_address(call.to)
        with self.translated(call.name):
            return int(self.web3.eth.estimate_gas(transaction) * _GAS_MARGIN)

    def sign(self, account: LocalAccount, call: Call, *, nonce: int, gas: int, gas_price_wei: int) -> tuple[str, bytes]:
        """Sign without sending: (transaction hash, raw transaction). Any chain takes this oldest form."""
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
        """Hand a signed transaction to the chain; one that it has already is success.

        Raises NonceUsed if the account has used the nonce for another one.
        """
        with self.translated("eth_sendRawTransaction"):
            try:
                self.web3.eth.send_raw_transaction(raw)
            except Web3RPCError as error:
                self._accept_if_known(Web3.keccak(raw), error)

    def sign_and_send(self, account: LocalAccount, call: Call, nonce: int | None = None) -> str:
        """Send the call from the account and return the transaction's hash. `nonce` None: the chain's count.

        For accounts with one sender. Sending the same again before it is mined is the same transaction, not a second.
        """
        gas = self.estimate_gas(account.address, call)
        nonce = self.nonce(account.address) if nonce is None else nonce
        tx_hash, raw = self.sign(account, call, nonce=nonce, gas=gas, gas_price_wei=self.gas_price())
        self.send_raw(raw)
        return tx_hash

    def receipt(self, tx_hash: str) -> Receipt | None:
        """The transaction's receipt, None as long as it is not mined (or was lost)."""
        with self.translated("eth_getTransactionReceipt"):
            try:
                raw = self.web3.eth.get_transaction_receipt(HexStr(tx_hash))
            except TransactionNotFound:
                return None
        return Receipt(
            tx_hash, int(raw["blockNumber"]), raw["status"] == 1, int(raw["gasUsed"]), raw["contractAddress"]
        )

    def wait_for_receipt(self, tx_hash: str, timeout_seconds: float) -> Receipt:
        """Wait until the transaction is mined. Raises ReceiptTimeout."""
        deadline = time.monotonic() + timeout_seconds
        pause = 0.02
        while (receipt := self.receipt(tx_hash)) is None:
            if time.monotonic() > deadline:
                raise ReceiptTimeout(
                    f"transaction {tx_hash}: not mined within {timeout_seconds:g} s; see whether the chain makes blocks"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        return receipt

    def transact(self, account: LocalAccount, call: Call, timeout_seconds: float, nonce: int | None = None) -> Receipt:
        """`sign_and_send`, wait, and raise ContractRefused if the transaction was mined but reverted."""
        receipt = self.wait_for_receipt(self.sign_and_send(account, call, nonce), timeout_seconds)
        if not receipt.succeeded:
            self.estimate_gas(account.address, call)  # says why, if the reason still holds
            raise ContractRefused("", f"{call.name}: transaction {receipt.tx_hash} reverted; send it again")
        return receipt

    # ----

    @functools.cached_property
    def _contract(self) -> Contract:
        return self.web3.eth.contract(address=self._address, abi=coordinator_abi())

    @property
    def _address(self) -> ChecksumAddress:
        return Web3.to_checksum_address(self.deployment.contract)

    @property
    def _rpc_source(self) -> str:
        return self.rpc.source

    def _own_version(self) -> str | None:
        transaction: TxParams = {"to": self._address, "data": HexStr(self._abi.encode_abi("version()"))}
        with self.translated("version()"):
            try:
                (version,) = decode(["string"], self.web3.eth.call(transaction))
            except (ContractLogicError, DecodingError):
                return None
        return str(version) if contract.is_version(version) else None

    def _read(self, signature: str, *arguments: Any) -> Any:
        with self.translated(signature.partition("(")[0]):
            return self._contract.get_function_by_signature(signature)(*arguments).call()

    def _accept_if_known(self, tx_hash: HexBytes, error: Web3RPCError) -> None:
        """Sent twice is sent: nodes word that differently, so the chain is asked for the transaction itself."""
        try:
            self.web3.eth.get_transaction(tx_hash)
            return
        except TransactionNotFound:
            pass
        message = str(error).lower()
        if "nonce" in message or "underpriced" in message:
            raise NonceUsed(
                f"transaction {Web3.to_hex(tx_hash)}: its nonce is used; read the account's nonce again"
            ) from error
        raise error


@functools.cache
def _selector(signature: str) -> bytes:
    return bytes(Web3.keccak(text=signature)[:4])


def _pieces(first: int, last: int, newest_first: bool) -> Iterator[tuple[int, int]]:
    starts = range(first, last + 1, _LOG_BLOCKS)
    for start in reversed(starts) if newest_first else starts:
        yield start, min(start + _LOG_BLOCKS - 1, last)

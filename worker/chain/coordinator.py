"""Client of the swarm coordinator contract: ours, or a foreign one with the same ABI, on any EVM JSON-RPC.

Reads are typed methods of `Coordinator`; writes are `Call`s built without any network and sent by whoever owns the key
(`sign_and_send` of client.py, or the queue of sender.py). Every method may raise ChainUnreachable (no answer in time)
and ChainError; reads and sends may raise ContractRefused.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from eth_typing import HexStr
from web3 import Web3
from web3.contract import Contract
from web3.exceptions import (
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
)
from web3.types import TxParams

from worker import settings
from worker.chain import contract
from worker.chain.client import Call, ChainClient
from worker.chain.contract import NO_ADDRESS, coordinator_abi
from worker.errors import ChainError

log = logging.getLogger(__name__)

# submitReward has two overloads, and by name web3 would pick uint256: always the signature.
_SUBMIT_REWARD = "submitReward(uint256,uint256,int256,string)"
_LOG_BLOCKS = 10_000
"""Blocks of one eth_getLogs: what public nodes commonly allow."""


@dataclass(frozen=True, slots=True)
class Event:
    """One log entry of the contract, decoded."""

    name: str
    arguments: dict[str, Any]
    block: int
    tx_hash: str


class Coordinator(ChainClient):
    """The contract that keeps a swarm's books. Making one sends nothing; the first call finds out where it is."""

    def __init__(self, chain: settings.Chain) -> None:
        super().__init__(chain)
        self._checked = False
        self._abi = Web3().eth.contract(abi=coordinator_abi())
        self.version: str | None = None
        """What our contract calls itself ("hivewright/2"); None before `check`, and for a foreign contract."""

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

    def ensure_checked(self) -> None:
        """`check`, unless it has passed before."""
        if not self._checked:
            self.check()

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
        return self.owners_of([peer_id])[0]

    def owners_of(self, peer_ids: Sequence[str]) -> list[str | None]:
        """For each of the peers what `owner_of` says."""
        owners = self.read("getEoa(string[])", list(peer_ids)) if peer_ids else ()
        with self.translated("getEoa"):
            return [None if owner == NO_ADDRESS else str(owner) for _, owner in zip(peer_ids, owners, strict=True)]

    def registered(self, peer_ids: Sequence[str]) -> set[str]:
        """Those of the peers that somebody registered."""
        owners = self.owners_of(peer_ids)
        return {peer_id for peer_id, owner in zip(peer_ids, owners, strict=True) if owner is not None}

    def peers_of(self, account: str) -> list[str]:
        """Peer ids that the account registered."""
        with self.translated("getPeerId"):
            (peers,) = self.read("getPeerId(address[])", [Web3.to_checksum_address(account)])
        return list(peers)

    def total_rewards(self, peer_ids: Sequence[str]) -> list[int]:
        """Sum of all rewards of each peer, in milli-rewards."""
        return [int(reward) for reward in self.read("getTotalRewards(string[])", list(peer_ids))]

    def total_wins(self, peer_id: str) -> int:
        return int(self.read("getTotalWins(string)", peer_id))

    def winner_leaderboard(self, start: int, end: int) -> list[tuple[str, int]]:
        """Peers on the places `start` to `end` (not included) with their wins, best first."""
        with self.translated("winnerLeaderboard"):
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
                found = [
                    Event(name, dict(entry["args"]), int(entry["blockNumber"]), Web3.to_hex(entry["transactionHash"]))
                    for entry in event.get_logs(filters or {}, from_block=first, to_block=last)
                ]
            yield from reversed(found) if newest_first else found

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

    # ----

    @functools.cached_property
    def _contract(self) -> Contract:
        return self.web3.eth.contract(address=self._address, abi=coordinator_abi())

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


@functools.cache
def _selector(signature: str) -> bytes:
    return bytes(Web3.keccak(text=signature)[:4])


def _pieces(first: int, last: int, newest_first: bool) -> Iterator[tuple[int, int]]:
    starts = range(first, last + 1, _LOG_BLOCKS)
    for start in reversed(starts) if newest_first else starts:
        yield start, min(start + _LOG_BLOCKS - 1, last)

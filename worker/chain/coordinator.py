"""Client of the swarm coordinator contract: ours, or a foreign one with the same ABI, on any EVM
JSON-RPC.

Reads are typed methods of `Coordinator`; writes are `Call`s built without any network and sent by
whoever owns the key (`sign_and_send` of client.py, or transaction_queue.py). Every method may raise
ChainUnreachable (no answer in time) and ChainError; reads and sends may raise ContractRefused.
"""

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from eth_typing import HexStr
from eth_utils.abi import abi_to_signature
from web3 import Web3
from web3.contract import Contract
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.logs import DISCARD
from web3.types import FilterParams, TxParams

from worker import settings
from worker.chain import contract
from worker.chain.client import Call, ChainClient, Unanswered, rpc_message
from worker.chain.contract import NO_ADDRESS, coordinator_abi, refusal
from worker.chain.logs import Window, walk
from worker.chain.rpc import TooMuch
from worker.errors import BadAnswer, ChainError, ContractRefused
from worker.log import printable

log = logging.getLogger(__name__)

# submitReward has two overloads, and by name web3 would pick uint256: always the signature.
_SUBMIT_REWARD = "submitReward(uint256,uint256,int256,string)"
_HAS_SUBMITTED = "hasSubmittedRoundStageReward(uint256,uint256,%s)"


@dataclass(frozen=True, slots=True)
class Event:
    """One log entry of the contract, decoded."""

    name: str
    arguments: dict[str, Any]
    block: int
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Abilities:
    """The answers of a contract that is not ours: its release is concluded from that, for it has no
    version."""

    tells_by_peer: bool
    """Which peer has submitted a reward (from release 0.6.0 on)."""
    tells_by_account: bool
    """Whether any peer of an account has (up to release 0.5)."""
    has_leaderboards: bool
    """Which peers won most often (up to release 0.4.2)."""

    @property
    def release(self) -> str:
        """Of the existing swarm's coordinator, by public releases; "unknown" for what is like none
        of them."""
        releases = {
            (False, True, True): "0.4.2",
            (False, True, False): "0.5",
            (True, False, False): "0.6.0",
        }
        return releases.get(
            (self.tells_by_peer, self.tells_by_account, self.has_leaderboards), "unknown"
        )

    @property
    def missing(self) -> list[str]:
        """Return what the contract lacks, for people."""
        who = self.tells_by_peer or self.tells_by_account
        lacking = [] if who else ["whether a reward is submitted (read from the log)"]
        return (
            lacking
            if self.has_leaderboards
            else [*lacking, "leaderboards (wins are read peer by peer)"]
        )


_OURS = Abilities(tells_by_peer=True, tells_by_account=True, has_leaderboards=True)


_FIRST_BLOCKS: dict[tuple[int, str], int] = {}
"""Found by this process, for every chain and contract: clients come and go with each outage."""


class LogGone(ChainError):
    """The contract says that there is something which its log does not have any more."""


class Coordinator(ChainClient):
    """The contract that keeps a swarm's records. Making one sends nothing; the first call finds out
    where it is."""

    def __init__(self, chain: settings.Chain) -> None:
        super().__init__(chain)
        self._checked = False
        self._abi = Web3().eth.contract(abi=coordinator_abi())
        self.version: str | None = None
        """What our contract calls itself ("hivewright/3"); None before `check`, and for a foreign
        contract."""
        self.abilities = _OURS
        """What a foreign contract answers, found out by `check`."""
        self._window = Window()
        self._first_block: int | None = None

    def check(self) -> None:
        """Make sure that the chain has the expected id and the contract code; find out whose
        contract it is."""
        self.check_id()
        if not self.has_code(self._address):
            raise ChainError(
                f"no contract at {self._address} on chain {self.deployment.chain_id}"
                f" ({self._rpc_source}); check chain.contract, or run `hivewright chain deploy`"
            )
        self.version = self._own_version()
        self.abilities = self._find_abilities() if self.version is None else _OURS
        self._checked = True
        log.info(
            "chain connected rpc=%s chain_id=%d contract=%s implementation=%s",
            ",".join(self.deployment.rpc_urls), self.deployment.chain_id, self._address, self.implementation,
        )  # fmt: skip

    @property
    def implementation(self) -> str:
        """Whose contract it is, after `check`: "hivewright/3", or "foreign-0.6.0" by the existing
        swarm's releases."""
        return self.version or f"foreign-{self.abilities.release}"

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
        """Multiaddrs, in the contract's order. They are untrusted peers' text: parse before use."""
        return list(self.read("getBootnodes()"))

    def owner_of(self, peer_id: str) -> str | None:
        """The account that registered the peer, None if nobody did."""
        return self.owners_of([peer_id])[0]

    def owners_of(self, peer_ids: Sequence[str]) -> list[str | None]:
        """For each of the peers what `owner_of` says."""
        owners = self.read("getEoa(string[])", list(peer_ids)) if peer_ids else ()
        with self.translated("getEoa"):
            return [
                None if owner == NO_ADDRESS else str(owner)
                for _, owner in zip(peer_ids, owners, strict=True)
            ]

    def registered(self, peer_ids: Sequence[str]) -> set[str]:
        """Those of the peers that somebody registered."""
        owners = self.owners_of(peer_ids)
        return {
            peer_id for peer_id, owner in zip(peer_ids, owners, strict=True) if owner is not None
        }

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

    def wins_of(self, peer_ids: Sequence[str]) -> list[int]:
        """Return how often others voted for each of the peers, over all rounds: where there is no
        leaderboard."""
        signature = "getTotalWins(string)"
        asked = [[self._call_data(signature, peer_id), "latest"] for peer_id in peer_ids]
        with self.translated(signature):
            answers = self.rpc.ask_all("eth_call", asked)
            return [
                self.total_wins(peer_id) if answer is None else int(answer, 16)
                for peer_id, answer in zip(peer_ids, answers, strict=True)
            ]

    def winner_leaderboard(self, start: int, end: int) -> list[tuple[str, int]]:
        """Peers on the places `start` to `end` (not included) with their wins, best first.

        Not every release has it (`abilities.has_leaderboards`); `wins_of` is on all.
        """
        with self.translated("winnerLeaderboard"):
            peers, wins = self.read("winnerLeaderboard(uint256,uint256)", start, end)
            return list(zip(peers, wins, strict=True))

    def votes(self, round: int, peer_id: str) -> list[str]:
        """Return whom the peer voted for; empty if it has not voted."""
        return list(self.read("getVoterVotes(uint256,string)", round, peer_id))

    def has_voted(self, round: int, peer_id: str) -> bool:
        return bool(self.votes(round, peer_id))

    def submitted_reward(
        self, round: int, stage: int, peer_id: str, tx_hash: str | None = None
    ) -> int | None:
        """The reward that the chain has for (round, stage, peer), None if it has none.

        On a foreign contract only the log has it; `tx_hash`, of a transaction that may have brought
        it there, spares searching that. Raises LogGone if it is submitted and no log says how much
        it is.
        """
        self.ensure_checked()
        if self.version is not None:
            submitted, reward = self._read(
                "getPeerReward(uint256,uint256,string)", round, stage, peer_id
            )
            return int(reward) if submitted else None
        has_submitted = self._has_submitted(round, stage, peer_id)
        if has_submitted is False:
            return None
        receipt = [] if tx_hash is None else self._events_of(tx_hash, "RewardSubmitted")
        filters = {"roundNumber": round, "stageNumber": stage, "account": self.owner_of(peer_id)}
        searched = (
            self.events("RewardSubmitted", filters, newest_first=True) if filters["account"] else ()
        )
        for event in itertools.chain(receipt, searched):
            said = event.arguments
            if (said["roundNumber"], said["stageNumber"], said["peerId"]) == (
                round,
                stage,
                peer_id,
            ):
                return int(said["reward"])
        if has_submitted and self.abilities.tells_by_peer:
            raise LogGone(
                f"RewardSubmitted: {self._address} ({self.implementation}) has a reward of"
                f" {peer_id} for round {round}, and the log of {self._rpc_source} does not say how"
                " much it is; use a node that has the whole log (chain.rpc_url)"
            )
        return None

    def _has_submitted(self, round: int, stage: int, peer_id: str) -> bool | None:
        """Return whether a foreign contract says that the peer may have submitted; None if it can't
        be asked."""
        if self.abilities.tells_by_peer:
            return bool(self._read(_HAS_SUBMITTED % "string", round, stage, peer_id))
        if not self.abilities.tells_by_account:
            return None
        owner = self.owner_of(peer_id)
        return owner is not None and bool(
            self._read(_HAS_SUBMITTED % "address", round, stage, owner)
        )

    def has_role(self, role: str, account: str) -> bool:
        """Return whether the account has OWNER_ROLE, BOOTNODE_MANAGER_ROLE or
        STAGE_MANAGER_ROLE."""
        return bool(
            self.read(
                "hasRole(bytes32,address)",
                Web3.keccak(text=role),
                Web3.to_checksum_address(account),
            )
        )

    def events(
        self,
        name: str,
        filters: dict[str, Any] | None = None,
        *,
        from_block: int | None = None,
        to_block: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Event]:
        """The contract's log entries of one name, `filters` by indexed arguments.

        `from_block` None: from where the contract was made; `to_block` None: up to the latest. Asks
        for pieces that the node takes (logs.py); end the iteration early where possible.
        """
        self.ensure_checked()
        to_block = self.block_number() if to_block is None else to_block
        from_block = self.first_block() if from_block is None else from_block
        # Nodes answer for blocks that they do not have as if nothing were in them.
        if (
            from_block <= to_block
            and self.rpc.num_addresses > 1
            and self.block_hash(to_block) is None
        ):
            raise BadAnswer(
                f"eth_getLogs of {name}: {self._rpc_source} has no block {to_block} yet; it is"
                " behind"
            )
        yield from walk(
            functools.partial(self._fetch_log, name, filters or {}),
            from_block,
            to_block,
            newest_first,
            self._window,
        )

    def first_block(self) -> int:
        """The block in which the contract was made; 0 if that can't be found out, which is
        logged."""
        if self._first_block is None:
            known = self.deployment.contract_block
            self._first_block = self._search_first_block() if known is None else known
        return self._first_block

    # ---- writes: built here, sent by whoever owns the key

    def call(self, signature: str, *arguments: Any) -> Call:
        """Any write of the contract by its signature, such as `registerPeer(string)`."""
        name, _, types = signature.removesuffix(")").partition("(")
        # By eth_abi itself: web3 takes ten times as long to find the function in the ABI.
        data = _selector(signature) + encode(types.split(",") if types else [], arguments)
        return Call(name, data, self.deployment.contract)

    def register_peer(self, peer_id: str) -> Call:
        return self.call("registerPeer(string)", peer_id)

    def submit_reward(
        self, round: int, stage: int, reward: int, peer_id: str, digest: str | None = None
    ) -> Call:
        """`reward` in milli-rewards: round(1000 x mean reward of the peer's own groups in that
        round).

        `digest` (32 bytes, hexadecimal) of the signed groups follows the arguments: no contract
        reads it, but who audits the reward finds it in the transaction (docs/decisions/0015).
        """
        call = self.call(_SUBMIT_REWARD, round, stage, reward, peer_id)
        return call if digest is None else replace(call, data=call.data + bytes.fromhex(digest))

    def reward_digest(self, tx_hash: str) -> str | None:
        """The digest that came with a submitted reward; None if none did, or the transaction is not
        known any more."""
        data = self._input_of(tx_hash) or self._input_of(
            tx_hash
        )  # a node that lags behind others answers null
        if data is None:
            return None
        try:
            _, arguments = self._abi.decode_function_input(data)
            call = self.call(_SUBMIT_REWARD, *arguments.values())
        except (Web3Exception, DecodingError, ValueError):
            return None  # not sent by a node: by a contract, say
        rest = data.removeprefix(call.data)
        return rest.hex() if len(rest) == 32 and data.startswith(call.data) else None

    def _input_of(self, tx_hash: str) -> bytes | None:
        with self.translated("eth_getTransactionByHash"):
            try:
                return bytes(self.web3.eth.get_transaction(HexStr(tx_hash))["input"])
            except TransactionNotFound:
                return None

    def submit_winners(self, round: int, winners: Sequence[str], peer_id: str) -> Call:
        return self.call("submitWinners(uint256,string[],string)", round, list(winners), peer_id)

    def add_bootnodes(self, multiaddrs: Sequence[str]) -> Call:
        return self.call("addBootnodes(string[])", list(multiaddrs))

    def remove_bootnode(self, index: int) -> Call:
        """On any contract. The last bootnode takes the removed one's place, so read the list again
        afterwards."""
        return self.call("removeBootnode(uint256)", index)

    def withdraw_bootnode(self, multiaddr: str) -> Call:
        """On our contract only: remove a bootnode by its text, wherever it stands."""
        return self.call("withdrawBootnode(string)", multiaddr)

    def update_stage_and_round(self) -> Call:
        return self.call("updateStageAndRound()")

    def advance_round(self, expected_round: int) -> Call:
        """On our contract only: refused (RoundMovedOn) unless the round still is
        `expected_round`."""
        return self.call("advanceRound(uint256)", expected_round)

    # ----

    @functools.cached_property
    def _contract(self) -> Contract:
        return self.web3.eth.contract(address=self._address, abi=coordinator_abi())

    @property
    def _kind_of_contract(self) -> str:
        return f" ({self.implementation})" if self._checked else ""

    def _fetch_log(self, name: str, filters: dict[str, Any], first: int, last: int) -> list[Event]:
        subject = f"eth_getLogs of {name}"
        with self.translated(subject):
            try:
                entries = self._contract.events[name]().get_logs(
                    filters, from_block=first, to_block=last
                )
            except Web3RPCError as error:
                # Whatever the node says: fewer blocks may do.
                said = printable(rpc_message(error))[:200]
                raise TooMuch(
                    f"{subject}: {self._rpc_source} refuses blocks {first} to {last}: {said}"
                ) from None
            return [_event(name, entry) for entry in entries]

    def _events_of(self, tx_hash: str, name: str) -> list[Event]:
        """Return what the contract logged in the transaction; empty if it is not mined, or not
        known any more."""
        with self.translated("eth_getTransactionReceipt"):
            try:
                receipt = self.web3.eth.get_transaction_receipt(HexStr(tx_hash))
            except TransactionNotFound:
                return []
            entries = self._contract.events[name]().process_receipt(receipt, errors=DISCARD)
            return [_event(name, entry) for entry in entries if entry["address"] == self._address]

    def _search_first_block(self) -> int:
        """Search for the contract's first block by asking when it began to have code."""
        place = self.deployment.chain_id, self._address
        low, high = 0, self.block_number()
        if _FIRST_BLOCKS.get(place, high + 1) <= high:
            return _FIRST_BLOCKS[place]
        try:
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self._had_code(middle) else (middle + 1, high)
            if low and not self._began_in(low):
                raise BadAnswer(
                    f"eth_getCode: {self._rpc_source} knows no beginning of {self._address}"
                )
        except BadAnswer as error:
            log.warning(
                "contract's first block not found, its log is read from block 0; set chain.contract_block if that "
                "takes long: %s", error
            )  # fmt: skip
            low = 0
        _FIRST_BLOCKS[place] = low
        return low

    def _had_code(self, block: int) -> bool:
        with self.translated("eth_getCode"):
            return len(self.web3.eth.get_code(self._address, block)) > 0

    def _began_in(self, block: int) -> bool:
        """Return whether the block has something that can have made the contract.

        Some nodes answer "no code" for state that they have forgotten.
        """
        with self.translated("eth_getBlockByNumber"):
            found = self.web3.eth.get_block(block, full_transactions=True)["transactions"]
            if any(isinstance(each, Mapping) and each.get("to") is None for each in found):
                return True
        with self.translated("eth_getLogs"):
            filters: FilterParams = {"address": self._address, "fromBlock": block, "toBlock": block}
            return len(self.web3.eth.get_logs(filters)) > 0

    def _find_abilities(self) -> Abilities:
        return Abilities(
            tells_by_peer=self._answers(_HAS_SUBMITTED % "string", 0, 0, ""),
            tells_by_account=self._answers(_HAS_SUBMITTED % "address", 0, 0, NO_ADDRESS),
            has_leaderboards=self._answers("winnerLeaderboard(uint256,uint256)", 0, 0),
        )

    def _answers(self, signature: str, *arguments: Any) -> bool:
        try:
            self._read(signature, *arguments)
        except (ContractRefused, Unanswered):  # the former by nodes whose words web3 does not know
            return False
        return True

    def _own_version(self) -> str | None:
        transaction: TxParams = {
            "to": self._address,
            "data": HexStr(self._abi.encode_abi("version()")),
        }
        with self.translated("version()"):
            try:
                (version,) = decode(["string"], self.web3.eth.call(transaction))
            except (ContractLogicError, DecodingError):
                return None
        return str(version) if contract.is_version(version) else None

    def _read(self, signature: str, *arguments: Any) -> Any:
        """By eth_abi itself: of overloads, web3 would try others than the one of this signature."""
        transaction: TxParams = {
            "to": self._address,
            "data": HexStr(self._call_data(signature, *arguments)["data"]),
        }
        with self.translated(signature):
            try:
                data = bytes(self.web3.eth.call(transaction))
            except ContractLogicError as error:
                raise Unanswered(
                    str(refusal(signature, error.data, error.message, self._kind_of_contract))
                ) from None
            try:
                kinds = _output_types()[signature]
                values = [
                    _plain(*pair)
                    for pair in zip(self.web3.codec.decode(kinds, data), kinds, strict=True)
                ]
            except DecodingError as error:
                raise BadFunctionCallOutput(str(error)) from None
            return values[0] if len(values) == 1 else values

    def _call_data(self, signature: str, *arguments: Any) -> dict[str, str]:
        call = self.call(signature, *arguments)
        return {"to": self._address, "data": "0x" + call.data.hex()}


@functools.cache
def _selector(signature: str) -> bytes:
    return bytes(Web3.keccak(text=signature)[:4])


@functools.cache
def _output_types() -> dict[str, list[str]]:
    """Return what each view of the contract returns, by its signature."""
    views = (entry for entry in coordinator_abi() if entry["type"] == "function")
    return {
        abi_to_signature(entry): [output["type"] for output in entry["outputs"]] for entry in views
    }


def _plain(value: Any, kind: str) -> Any:
    """Lists for tuples, and addresses with their checksum."""
    if isinstance(value, tuple):
        return [_plain(each, kind) for each in value]
    return Web3.to_checksum_address(value) if kind.startswith("address") else value


def _event(name: str, entry: Any) -> Event:
    return Event(
        name, dict(entry["args"]), int(entry["blockNumber"]), Web3.to_hex(entry["transactionHash"])
    )

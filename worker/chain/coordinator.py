"""Client of the swarm coordinator contract, ours or a foreign one with the same ABI.

Reads are typed methods of `Coordinator`. Writes are `Call`s, built without network access and sent
by the owner of a key (`sign_and_send` of client.py, or transaction_queue.py). Every method may
raise ChainUnreachable (no answer in time) and ChainError; reads and sends may raise
ContractRefused.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from eth_typing import ChecksumAddress, HexStr
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
from worker.chain.rpc import CHECK_ADDRESS, TooMuch
from worker.errors import BadAnswer, ChainError, ContractRefused
from worker.log import printable

log = logging.getLogger(__name__)

# submitReward has two overloads; by its name web3 would choose uint256, so use the signature.
_SUBMIT_REWARD = "submitReward(uint256,uint256,int256,string)"
_HAS_SUBMITTED = "hasSubmittedRoundStageReward(uint256,uint256,%s)"


@dataclass(frozen=True, slots=True)
class Event:
    """A decoded log entry of the contract."""

    name: str
    arguments: dict[str, Any]
    block: int
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Abilities:
    """The views that a foreign contract has; its release is inferred from them."""

    tells_by_peer: bool
    """It has a view of whether a peer submitted a reward (from release 0.6.0 on)."""
    tells_by_account: bool
    """It has a view of whether any peer of an account submitted one (up to release 0.5)."""
    has_leaderboards: bool
    """It has views of the peers that won most often (up to release 0.4.2)."""

    @property
    def release(self) -> str:
        """The public release of RL Swarm's coordinator; "unknown" if none matches."""
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
        """The views that the contract lacks, for people."""
        lacking = []
        if not (self.tells_by_peer or self.tells_by_account):
            lacking.append("whether a reward is submitted (read from the log)")
        if not self.has_leaderboards:
            lacking.append("leaderboards (wins are read peer by peer)")
        return lacking


_OURS = Abilities(tells_by_peer=True, tells_by_account=True, has_leaderboards=True)


_FIRST_BLOCKS: dict[tuple[int, str], int] = {}
"""First blocks that this process has found, by chain and contract; shared by all clients."""


class LogGone(ChainError):
    """The contract has a record that its log no longer shows."""


class Coordinator(ChainClient):
    """Client of the contract that records a swarm's rounds, rewards, votes and bootnodes.

    The first call locates the contract.
    """

    def __init__(self, chain: settings.Chain) -> None:
        super().__init__(chain)
        self._checked = False
        self._abi = Web3().eth.contract(abi=coordinator_abi())
        self.version: str | None = None
        """Our contract's version ("hivewright/3"); None before `check`, and for a foreign one."""
        self.abilities = _OURS
        """Abilities of a foreign contract, detected by `check`."""
        self._window = Window()
        self._first_block: int | None = None

    def check(self) -> None:
        """Verify the chain's id and the contract's code, and detect the kind of contract."""
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
            ",".join(self.deployment.rpc_urls),
            self.deployment.chain_id,
            self._address,
            self.implementation,
        )

    @property
    def implementation(self) -> str:
        """The implementation, known after `check`, such as "hivewright/3" or "foreign-0.6.0"."""
        return self.version or f"foreign-{self.abilities.release}"

    def ensure_checked(self) -> None:
        """Call `check` unless it passed before."""
        if not self._checked:
            self.check()

    # ---- reads

    def read(
        self,
        signature: str,
        *arguments: Any,
    ) -> Any:
        """Call any view of the contract by its signature, such as `getTotalWins(string)`."""
        self.ensure_checked()
        return self._read(signature, *arguments)

    def current_round(self) -> int:
        return int(self.read("currentRound()"))

    def current_stage(self) -> int:
        return int(self.read("currentStage()"))

    def bootnodes(self) -> list[str]:
        """Return multiaddrs in the contract's order; untrusted text, to be parsed before use."""
        return list(self.read("getBootnodes()"))

    def owner_of(self, peer_id: str) -> str | None:
        """Return the account that registered the peer; None if none did."""
        return self.owners_of([peer_id])[0]

    def owners_of(
        self,
        peer_ids: Sequence[str],
    ) -> list[str | None]:
        """Return for each peer the account that registered it; None if none did."""
        if not peer_ids:
            return []
        owners = self.read("getEoa(string[])", list(peer_ids))
        if len(owners) != len(peer_ids):
            raise BadAnswer(
                f"getEoa: {self._rpc_source} gives an answer in an unexpected form ({len(owners)}"
                f" accounts for {len(peer_ids)} peers); {CHECK_ADDRESS}"
            )
        return [None if owner == NO_ADDRESS else str(owner) for owner in owners]

    def registered(
        self,
        peer_ids: Sequence[str],
    ) -> set[str]:
        """Return the peers among `peer_ids` that are registered."""
        owners = dict(zip(peer_ids, self.owners_of(peer_ids), strict=True))
        return {peer_id for peer_id, owner in owners.items() if owner is not None}

    def total_rewards(
        self,
        peer_ids: Sequence[str],
    ) -> list[int]:
        """Return the sum of all rewards of each peer, in milli-rewards."""
        rewards = self.read("getTotalRewards(string[])", list(peer_ids))
        return [int(reward) for reward in rewards]

    def wins_of(
        self,
        peer_ids: Sequence[str],
    ) -> list[int]:
        """Return the number of votes for each peer over all rounds, on contracts of any release."""
        signature = "getTotalWins(string)"
        asked = [[self._call_data(signature, peer_id), "latest"] for peer_id in peer_ids]
        with self.translated(signature):
            answers = self.rpc.ask_all("eth_call", asked)
            wins = []
            for peer_id, answer in zip(peer_ids, answers, strict=True):
                if answer is None:
                    wins.append(int(self.read(signature, peer_id)))
                else:
                    wins.append(int(answer, 16))
            return wins

    def winner_leaderboard(
        self,
        start: int,
        end: int,
    ) -> list[tuple[str, int]]:
        """Return the peers ranked `start` to `end` (exclusive) with their wins, best first.

        Not every release has it (`abilities.has_leaderboards`); `wins_of` works on all.
        """
        with self.translated("winnerLeaderboard"):
            peers, wins = self.read("winnerLeaderboard(uint256,uint256)", start, end)
            return list(zip(peers, wins, strict=True))

    def votes(
        self,
        round: int,
        peer_id: str,
    ) -> list[str]:
        """Return the peers that the peer voted for; empty if it has not voted."""
        return list(self.read("getVoterVotes(uint256,string)", round, peer_id))

    def submitted_reward(
        self,
        round: int,
        stage: int,
        peer_id: str,
        tx_hash: str | None = None,
    ) -> int | None:
        """Return the reward recorded for (round, stage, peer); None if there is none.

        On a foreign contract only the log has it. `tx_hash` of a transaction that may have
        submitted it saves a search of the log. Raises LogGone if it was submitted but no log entry
        shows the amount.
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
        for event in self._possible_rewards(round, stage, peer_id, tx_hash):
            said = event.arguments
            key = said["roundNumber"], said["stageNumber"], said["peerId"]
            if key == (round, stage, peer_id):
                return int(said["reward"])
        if has_submitted and self.abilities.tells_by_peer:
            raise LogGone(
                f"RewardSubmitted: {self._address} ({self.implementation}) has a reward of"
                f" {peer_id} for round {round}, and the log of {self._rpc_source} does not say how"
                " much it is; use a node that has the whole log (chain.rpc_url)"
            )
        return None

    def _possible_rewards(
        self, round: int, stage: int, peer_id: str, tx_hash: str | None
    ) -> Iterator[Event]:
        """Yield events of the transaction, then those of the peer's account, newest first."""
        if tx_hash is not None:
            yield from self._events_of(tx_hash, "RewardSubmitted")
        owner = self.owner_of(peer_id)
        if owner is not None:
            filters = {"roundNumber": round, "stageNumber": stage, "account": owner}
            yield from self.events("RewardSubmitted", filters, newest_first=True)

    def _has_submitted(
        self,
        round: int,
        stage: int,
        peer_id: str,
    ) -> bool | None:
        """Return whether a foreign contract says that the peer may have submitted.

        None if the contract has no view for that.
        """
        if self.abilities.tells_by_peer:
            return bool(self._read(_HAS_SUBMITTED % "string", round, stage, peer_id))
        if not self.abilities.tells_by_account:
            return None
        owner = self.owner_of(peer_id)
        if owner is None:
            return False
        return bool(self._read(_HAS_SUBMITTED % "address", round, stage, owner))

    def has_role(
        self,
        role: str,
        account: str,
    ) -> bool:
        """Return whether the account has the role.

        Roles: OWNER_ROLE, BOOTNODE_MANAGER_ROLE, STAGE_MANAGER_ROLE.
        """
        address = Web3.to_checksum_address(account)
        return bool(self.read("hasRole(bytes32,address)", Web3.keccak(text=role), address))

    def events(
        self,
        name: str,
        filters: dict[str, Any] | None = None,
        *,
        from_block: int | None = None,
        to_block: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Event]:
        """Yield the contract's log entries of one name, with `filters` by indexed arguments.

        `from_block` None: from the contract's creation; `to_block` None: up to the latest block.
        The log is requested in pieces that the node accepts (logs.py); end the iteration early
        where possible.
        """
        self.ensure_checked()
        to_block = self.block_number() if to_block is None else to_block
        from_block = self.first_block() if from_block is None else from_block
        if from_block <= to_block and self.rpc.num_addresses > 1:
            self._require_block(to_block, f"eth_getLogs of {name}")
        yield from walk(
            functools.partial(self.fetch_log, self._contract, name, filters or {}),
            from_block,
            to_block,
            newest_first,
            self._window,
        )

    def fetch_log(
        self,
        contract: Contract,
        name: str,
        filters: dict[str, Any],
        first: int,
        last: int,
    ) -> list[Event]:
        """Return a contract's log entries in these blocks. Raises TooMuch if the node refuses."""
        subject = f"eth_getLogs of {name}"
        with self.translated(subject):
            try:
                entries = contract.events[name]().get_logs(filters, from_block=first, to_block=last)
            except Web3RPCError as error:
                # For any reason: a request for fewer blocks may succeed.
                said = printable(rpc_message(error))[:200]
                raise TooMuch(
                    f"{subject}: {self._rpc_source} refuses blocks {first} to {last}: {said}"
                ) from None
            return [_event_of(name, entry) for entry in entries]

    def _require_block(
        self,
        block: int,
        subject: str,
    ) -> None:
        """Raise BadAnswer if the node lacks the block, which it would treat as empty."""
        if self.block_hash(block) is None:
            raise BadAnswer(f"{subject}: {self._rpc_source} has no block {block} yet; it is behind")

    def first_block(self) -> int:
        """Return the block that created the contract; 0 if it is not found, which is logged."""
        if self._first_block is None:
            known = self.deployment.contract_block
            self._first_block = self._search_first_block() if known is None else known
        return self._first_block

    # ---- writes: built here, sent by the owner of the key

    def call(
        self,
        signature: str,
        *arguments: Any,
    ) -> Call:
        """Return any write of the contract by its signature, such as `registerPeer(string)`."""
        name, _, types = signature.removesuffix(")").partition("(")
        # With eth_abi, because web3 takes ten times as long to find the function in the ABI.
        encoded = encode(types.split(","), arguments) if types else b""
        return Call(name, selector(signature) + encoded, self.deployment.contract)

    def register_peer(self, peer_id: str) -> Call:
        return self.call("registerPeer(string)", peer_id)

    def submit_reward(
        self,
        round: int,
        stage: int,
        reward: int,
        peer_id: str,
        digest: str | None = None,
    ) -> Call:
        """Return the call that submits `reward`, in milli-rewards.

        That is round(1000 x mean reward of the peer's own groups in the round). `digest` (32 bytes,
        hexadecimal) of the signed groups follows the arguments: contracts ignore it, and an auditor
        finds it in the transaction (docs/decisions/0015).
        """
        call = self.call(_SUBMIT_REWARD, round, stage, reward, peer_id)
        if digest is None:
            return call
        return replace(call, data=call.data + bytes.fromhex(digest))

    def reward_digest(self, tx_hash: str) -> str | None:
        """Return the digest that was sent with a reward.

        None if the transaction has none, or the chain no longer knows the transaction.
        """
        data = self.input_of(tx_hash)
        if data is None:
            data = self.input_of(tx_hash)  # a node that lags behind others answered null
        if data is None:
            return None
        try:
            _, arguments = self._abi.decode_function_input(data)
            call = self.call(_SUBMIT_REWARD, *arguments.values())
        except (Web3Exception, DecodingError, ValueError):
            return None  # such as one that a contract sent, not a node
        rest = data.removeprefix(call.data)
        has_digest = len(rest) == 32 and data.startswith(call.data)
        return rest.hex() if has_digest else None

    def input_of(self, tx_hash: str) -> bytes | None:
        """Return the data that a transaction was sent with; None: the node does not know it."""
        with self.translated("eth_getTransactionByHash"):
            try:
                return bytes(self.web3.eth.get_transaction(HexStr(tx_hash))["input"])
            except TransactionNotFound:
                return None

    def submit_winners(
        self,
        round: int,
        winners: Sequence[str],
        peer_id: str,
    ) -> Call:
        return self.call("submitWinners(uint256,string[],string)", round, list(winners), peer_id)

    def add_bootnodes(self, multiaddrs: Sequence[str]) -> Call:
        return self.call("addBootnodes(string[])", list(multiaddrs))

    def remove_bootnode(self, index: int) -> Call:
        """Return the call that removes a bootnode by index, on any contract.

        The last bootnode takes its place, so read the list again afterwards.
        """
        return self.call("removeBootnode(uint256)", index)

    def withdraw_bootnode(self, multiaddr: str) -> Call:
        """Return the call that removes a bootnode by its text; on our contract only."""
        return self.call("withdrawBootnode(string)", multiaddr)

    def update_stage_and_round(self) -> Call:
        return self.call("updateStageAndRound()")

    def advance_round(self, expected_round: int) -> Call:
        """Return the call that ends a round; on our contract only.

        The contract refuses it (RoundMovedOn) unless the round still is `expected_round`.
        """
        return self.call("advanceRound(uint256)", expected_round)

    # ----

    @functools.cached_property
    def _contract(self) -> Contract:
        return self.web3.eth.contract(address=self._address, abi=coordinator_abi())

    @property
    def _address(self) -> ChecksumAddress:
        return Web3.to_checksum_address(self.deployment.contract)

    @property
    def _kind_of_contract(self) -> str:
        return f" ({self.implementation})" if self._checked else ""

    def _events_of(
        self,
        tx_hash: str,
        name: str,
    ) -> list[Event]:
        """Return the contract's log entries in a transaction; empty if it is not known."""
        with self.translated("eth_getTransactionReceipt"):
            try:
                receipt = self.web3.eth.get_transaction_receipt(HexStr(tx_hash))
            except TransactionNotFound:
                return []
            event = self._contract.events[name]()
            entries = event.process_receipt(receipt, errors=DISCARD)
            ours = [entry for entry in entries if entry["address"] == self._address]
            return [_event_of(name, entry) for entry in ours]

    def _search_first_block(self) -> int:
        """Bisect for the first block in which the contract has code."""
        place = self.deployment.chain_id, self._address
        low, high = 0, self.block_number()
        if _FIRST_BLOCKS.get(place, high + 1) <= high:
            return _FIRST_BLOCKS[place]
        try:
            while low < high:
                middle = (low + high) // 2
                if self.has_code(self._address, middle):
                    high = middle
                else:
                    low = middle + 1
            if low and not self._began_in(low):
                raise BadAnswer(
                    f"eth_getCode: {self._rpc_source} knows no beginning of {self._address}"
                )
        except BadAnswer as error:
            log.warning(
                "contract's first block not found, its log is read from block 0; set"
                " chain.contract_block if that takes long: %s",
                error,
            )
            low = 0
        _FIRST_BLOCKS[place] = low
        return low

    def _began_in(self, block: int) -> bool:
        """Return whether the block contains a transaction that can have created the contract.

        Some nodes answer "no code" for state that they have pruned.
        """
        with self.translated("eth_getBlockByNumber"):
            found = self.web3.eth.get_block(block, full_transactions=True)["transactions"]
            transactions = [each for each in found if isinstance(each, Mapping)]
            if any(each.get("to") is None for each in transactions):
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

    def _answers(
        self,
        signature: str,
        *arguments: Any,
    ) -> bool:
        try:
            self._read(signature, *arguments)
        except (ContractRefused, Unanswered):  # ChainError: for messages that web3 does not know
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

    def _read(
        self,
        signature: str,
        *arguments: Any,
    ) -> Any:
        """Call a view with eth_abi; web3 may choose another overload than the signature's."""
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
            kinds = _output_types()[signature]
            try:
                decoded = self.web3.codec.decode(kinds, data)
            except DecodingError as error:
                raise BadFunctionCallOutput(str(error)) from None
            values = [_plain(*pair) for pair in zip(decoded, kinds, strict=True)]
            return values[0] if len(values) == 1 else values

    def _call_data(
        self,
        signature: str,
        *arguments: Any,
    ) -> dict[str, str]:
        call = self.call(signature, *arguments)
        return {"to": self._address, "data": "0x" + call.data.hex()}


def submitted(call: Call) -> tuple[str, int] | None:
    """Return peer and reward of a call of `submit_reward`; None: it is another call."""
    if call.data[:4] != selector(_SUBMIT_REWARD):
        return None
    _, _, types = _SUBMIT_REWARD.removesuffix(")").partition("(")
    _, _, reward, peer_id = decode(types.split(","), call.data[4:])
    return str(peer_id), int(reward)


@functools.cache
def selector(signature: str) -> bytes:
    """Return the four bytes with which the call of a function begins."""
    return bytes(Web3.keccak(text=signature)[:4])


@functools.cache
def _output_types() -> dict[str, list[str]]:
    """Return the output types of each view of the contract, by its signature."""
    types = {}
    for entry in coordinator_abi():
        if entry["type"] == "function":
            types[abi_to_signature(entry)] = [output["type"] for output in entry["outputs"]]
    return types


def _plain(value: Any, kind: str) -> Any:
    """Convert tuples to lists, and addresses to their checksummed form."""
    if isinstance(value, tuple):
        return [_plain(each, kind) for each in value]
    return Web3.to_checksum_address(value) if kind.startswith("address") else value


def _event_of(name: str, entry: Any) -> Event:
    return Event(
        name=name,
        arguments=dict(entry["args"]),
        block=int(entry["blockNumber"]),
        tx_hash=Web3.to_hex(entry["transactionHash"]),
    )

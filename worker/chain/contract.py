"""The contracts in this package: ABI, bytecode, and advice for each of their errors."""

import functools
import json
import re
from importlib import resources
from typing import Any

from eth_utils.abi import function_abi_to_4byte_selector
from web3 import Web3

from worker.errors import ContractRefused
from worker.log import printable

NO_ADDRESS = "0x" + "00" * 20

ADVICE = {
    "AddressEmptyCode": "there is no code at the address; deploy the new implementation first",
    "AlreadyClaimed": "the peer was paid for this game; nothing to do",
    "AlreadyGuessed": "the bet of this peer and round is on the chain; nothing to do",
    "BetTooLarge": "the bet exceeds the peer's balance; bet at most what betTokenBalance gives",
    "BetTooSmall": "a bet has at least 0.001 tokens and buys at least one unit; bet more",
    "BettingClosed": "the game's last round is over; bet in the next game",
    "DeadlineNotReached": "the judge may still act; wait until the game's deadline",
    "DeadlinePassed": (
        "the judge did not act in time, so the game can only be cancelled; claim the bets back"
    ),
    "ERC1967InvalidImplementation": (
        "there is no code at the new implementation's address; deploy it first"
    ),
    "ERC1967NonPayable": "an upgrade without a call takes no money; send none",
    "FailedCall": "the call that came with the upgrade failed; check its data",
    "GameNotOver": "the game's rounds or its answer are still to come; wait for them",
    "InvalidBootnodeIndex": "the list of bootnodes changed meanwhile; read it again",
    "InvalidCounts": "a game has 1 to 64 rounds and 2 to 64 choices; correct the numbers",
    "InvalidInitialization": "the contract is initialised already; nothing to do",
    "InvalidOwner": "the owner's address is zero; name the owner's address",
    "InvalidPeerId": "a peer id has 1 to 128 bytes; check the identity file",
    "InvalidProof": (
        "not signed by the peer's key, or for another account, contract, chain or move; sign again"
    ),
    "InvalidReveal": (
        "not the answer and number that were committed when the game was opened; reveal those"
    ),
    "InvalidRoundNumber": (
        "the chain has not reached this round; check that node and chain are of one swarm"
    ),
    "InvalidStageNumber": (
        "the chain has not reached this stage, or the round has none of that number; submit stage 0"
    ),
    "InvalidVote": "a vote names at least one peer and none twice; correct the list",
    "InvalidVoterPeerId": (
        "the sending account did not register this peer id; send from the account that did"
    ),
    "NotAllowed": "the sending account lacks the coordinator's OWNER_ROLE; use the owner's account",
    "NotInitializing": "only an initialiser may do this; nothing to do",
    "NotPeersAccount": (
        "the sending account did not register this peer id; send from the account that did"
    ),
    "NothingToClaim": "the peer has no bet that is paid in this game; nothing to do",
    "OnlyBootnodeManager": (
        "the sending account lacks BOOTNODE_MANAGER_ROLE; the contract's owner can grant it"
    ),
    "OnlyOwner": "the sending account lacks OWNER_ROLE; send from the owner's account",
    "OnlyStageManager": (
        "the sending account lacks STAGE_MANAGER_ROLE; the contract's owner can grant it"
    ),
    "OwnableInvalidOwner": "the judge's address is zero; name the judge's address",
    "OwnableUnauthorizedAccount": "the sending account is not the judge; send from the judge's",
    "PeerIdAlreadyRegistered": (
        "the peer id is taken; if another account holds it, use the account that registered it"
    ),
    "RewardAlreadySubmitted": (
        "the reward of this peer, round and stage is on the chain; nothing to do"
    ),
    "RewardOutOfRange": (
        "the contract accepts rewards of at most 127 bits; check how the reward was computed"
    ),
    "RoundMovedOn": "another keeper advanced the round; nothing to do",
    "StageOutOfBounds": "the contract is in a stage that it does not have; upgrade it",
    "UUPSUnauthorizedCallContext": "an upgrade goes through the proxy; check chain.contract",
    "UUPSUnsupportedProxiableUUID": "the new implementation is not upgradeable; deploy one that is",
    "UnknownChoice": "the game has no choice of this number; the first is 0",
    "UnknownGame": "the market has no game of this number; check market.contract",
    "WinnerAlreadyVoted": "the vote of this peer and round is on the chain; nothing to do",
    "WrongRound": "the bet is for another round than the current one; bet on the current clue",
}
"""Advice for each error of the contracts, by its name in the ABI."""


@functools.cache
def artifact(name: str) -> dict[str, Any]:
    """Return the output of `contracts/build.js` for a contract.

    Its keys: abi, bytecode, storage_layout, source_sha256, compiler.
    """
    text = resources.files("worker.chain").joinpath("artifacts", f"{name}.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def carried_version(name: str = "SwarmCoordinator") -> str:
    """Return the version of a contract in this package, such as "hivewright/3"."""
    return str(artifact(name)["version"])


def is_version(text: str) -> bool:
    """Return whether `text` is a version of one of our contracts."""
    return re.fullmatch(r"hivewright/[1-9][0-9]{0,5}", text) is not None


def number_of(version: str) -> int:
    """Return 3 for "hivewright/3"."""
    return int(version.partition("/")[2])


def coordinator_abi() -> list[Any]:
    """Return the ABI of our coordinator, a superset of RL Swarm's 0.4.2."""
    abi: list[Any] = artifact("SwarmCoordinator")["abi"]
    return abi


def market_abi() -> list[Any]:
    """Return the ABI of our prediction market, a superset of the existing one's."""
    abi: list[Any] = artifact("PredictionMarket")["abi"]
    return abi


@functools.cache
def _error_names() -> dict[str, str]:
    """Return the names of the contracts' errors, by selector (0x...)."""
    names = {}
    for entry in (*coordinator_abi(), *market_abi()):
        if entry["type"] == "error":
            names["0x" + function_abi_to_4byte_selector(entry).hex()] = entry["name"]
    return names


def refusal(
    subject: str,
    data: object,
    message: str | None,
    kind: str = "",
) -> ContractRefused:
    """Return the error for a call that reverted with `data`.

    `data` is 0x..., None or anything else that a node sent. A revert without one of the contract's
    named errors gets the name "" and the node's own `message`. `kind` describes the contract in
    that message.
    """
    selector = data[:10] if isinstance(data, str) else ""
    name = _error_names().get(selector, "")
    if name:
        return ContractRefused(name, f"{subject}: the contract refused: {name}; {ADVICE[name]}")
    reason = printable(message or "no reason given")
    return ContractRefused(
        "",
        f"{subject}: the contract refused: {reason}{kind}; check chain.contract and what was sent",
    )


def proxy_data(owner: str, implementation: str) -> bytes:
    """Return the creation code of a proxy in front of a coordinator.

    The proxy is initialised for `owner` in the same transaction.
    """
    coordinator = Web3().eth.contract(abi=coordinator_abi())
    return _proxy_data(implementation, coordinator.encode_abi("initialize(address)", [owner]))


def market_proxy_data(
    coordinator: str,
    judge: str,
    implementation: str,
) -> bytes:
    """Return the creation code of a proxy in front of a market for the swarm of `coordinator`."""
    market = Web3().eth.contract(abi=market_abi())
    initialise = market.encode_abi("initialize(address,address)", [coordinator, judge])
    return _proxy_data(implementation, initialise)


def _proxy_data(implementation: str, initialise: str) -> bytes:
    eth, proxy = Web3().eth, artifact("ERC1967Proxy")
    factory = eth.contract(abi=proxy["abi"], bytecode=proxy["bytecode"])
    creation = factory.constructor(implementation, bytes.fromhex(initialise[2:]))
    data = str(creation.data_in_transaction)
    return bytes.fromhex(data[2:])

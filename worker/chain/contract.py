"""The coordinator contract in this package: ABI, bytecode, and advice for each of its errors."""

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
    "ERC1967InvalidImplementation": (
        "there is no code at the new implementation's address; deploy it first"
    ),
    "ERC1967NonPayable": "an upgrade without a call takes no money; send none",
    "FailedCall": "the call that came with the upgrade failed; check its data",
    "InvalidBootnodeIndex": "the list of bootnodes changed meanwhile; read it again",
    "InvalidInitialization": "the contract is initialised already; nothing to do",
    "InvalidOwner": "the owner's address is zero; name the owner's address",
    "InvalidPeerId": "a peer id has 1 to 128 bytes; check the identity file",
    "InvalidProof": (
        "not signed by the peer's key, or for another account, contract, chain or move; sign again"
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
    "NotInitializing": "only an initialiser may do this; nothing to do",
    "OnlyBootnodeManager": (
        "the sending account lacks BOOTNODE_MANAGER_ROLE; the contract's owner can grant it"
    ),
    "OnlyOwner": "the sending account lacks OWNER_ROLE; send from the owner's account",
    "OnlyStageManager": (
        "the sending account lacks STAGE_MANAGER_ROLE; the contract's owner can grant it"
    ),
    "PeerIdAlreadyRegistered": (
        "the peer id is taken; if another account holds it, use the account that registered it"
    ),
    "RewardAlreadySubmitted": (
        "the reward of this peer, round and stage is on the chain; nothing to do"
    ),
    "RewardOutOfRange": (
        "the contract takes rewards of at most 127 bits; check how the reward was computed"
    ),
    "RoundMovedOn": "another keeper advanced the round; nothing to do",
    "StageOutOfBounds": "the contract is in a stage that it does not have; upgrade it",
    "UUPSUnauthorizedCallContext": "an upgrade goes through the proxy; check chain.contract",
    "UUPSUnsupportedProxiableUUID": "the new implementation is not upgradeable; deploy one that is",
    "WinnerAlreadyVoted": "the vote of this peer and round is on the chain; nothing to do",
}
"""Advice for each error of the contract, by its name in the ABI."""


@functools.cache
def artifact(name: str) -> dict[str, Any]:
    """Return the output of `contracts/build.js` for a contract.

    Its keys: abi, bytecode, storage_layout, source_sha256, compiler.
    """
    text = resources.files("worker.chain").joinpath("artifacts", f"{name}.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def carried_version() -> str:
    """Return the version of the coordinator in this package, such as "hivewright/3"."""
    return str(artifact("SwarmCoordinator")["version"])


def is_version(text: str) -> bool:
    """Return whether `text` is the version of a hivewright coordinator, of any number."""
    return re.fullmatch(r"hivewright/[1-9][0-9]{0,5}", text) is not None


def number_of(version: str) -> int:
    """Return 3 for "hivewright/3"."""
    return int(version.partition("/")[2])


def coordinator_abi() -> list[Any]:
    """Return the ABI of our coordinator, a superset of the existing swarm's 0.4.2."""
    abi: list[Any] = artifact("SwarmCoordinator")["abi"]
    return abi


@functools.cache
def _error_names() -> dict[str, str]:
    """Return the names of the contract's errors, by selector (0x...)."""
    names = {}
    for entry in coordinator_abi():
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
    """Return the creation code of a proxy in front of `implementation`.

    The proxy is initialised for `owner` in the same transaction.
    """
    eth, proxy = Web3().eth, artifact("ERC1967Proxy")
    coordinator = eth.contract(abi=coordinator_abi())
    initialise = coordinator.encode_abi("initialize(address)", [owner])
    factory = eth.contract(abi=proxy["abi"], bytecode=proxy["bytecode"])
    creation = factory.constructor(implementation, bytes.fromhex(initialise[2:]))
    data = str(creation.data_in_transaction)
    return bytes.fromhex(data[2:])

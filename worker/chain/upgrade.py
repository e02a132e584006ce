"""Upgrade the contracts on a chain to the versions in this package (`hivewright chain deploy`).

A proxy has the contract's state, an implementation has its code; the owner may replace the
implementation (ERC-1967, UUPS). That is done only if the new storage layout is compatible with the
old one. The chain does not store layouts: they come from the file that `deploy` wrote when it
deployed the old implementation, or from the releases in `artifacts/releases`.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from eth_account.signers.local import LocalAccount
from web3 import Web3

from worker.chain import contract, storage_layout
from worker.chain.client import Call, NonceUsed
from worker.chain.coordinator import Coordinator
from worker.errors import ChainError
from worker.runtime.files import write_whole

log = logging.getLogger(__name__)

COORDINATOR = "SwarmCoordinator"
NOTE_FILE = "implementation.json"
"""File in `keeper.state_dir` about the coordinator's implementation on the chain.

Its keys: version, runtime_sha256, storage_layout.
"""
MARKET_NOTE_FILE = "market-implementation.json"
_SLOT = int.from_bytes(Web3.keccak(text="eip1967.proxy.implementation")) - 1
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Found:
    """The implementation behind a proxy. `digest`: SHA-256 of its code, own address zeroed."""

    address: str
    digest: str


@dataclass(frozen=True, slots=True)
class Deployed:
    """A contract on the chain. `name`: its kind in this package; `version` None: it is foreign."""

    name: str
    address: str
    version: str | None


def bring_up_to_date(
    client: Coordinator,
    owner: LocalAccount,
    note_file: Path,
    patience_seconds: float,
    target: Deployed | None = None,
) -> None:
    """Put our implementation behind the proxy, unless ours, a newer or a foreign one is there.

    `target` None: the coordinator of `client`, whose owner may upgrade every contract of the swarm.
    Raises ChainError if our storage layout breaks the current one, or that one is not known.
    """
    if target is None:
        target = Deployed(COORDINATOR, client.deployment.contract, client.version)
    carried = contract.artifact(target.name)
    ours = contract.carried_version(target.name)
    found = implementation(client, target.address)
    if found is None or target.version is None:
        log.warning(
            "contract not upgraded, it is foreign contract=%s expected=%s",
            target.address,
            target.name,
        )
        return
    if found.digest != carried["runtime_sha256"]:
        if contract.number_of(target.version) > contract.number_of(ours):
            log.warning(
                "contract not upgraded, it is newer version=%s ours=%s", target.version, ours
            )
            return
        if not client.has_role("OWNER_ROLE", owner.address):
            log.warning(
                "contract not upgraded, this account is not its owner account=%s version=%s",
                owner.address,
                target.version,
            )
            return
        _require_fitting(found, target, note_file)
        _upgrade(client, owner, target, patience_seconds)
        log.info(
            "contract upgraded from=%s to=%s contract=%s", target.version, ours, target.address
        )
    note = {
        "version": ours,
        "runtime_sha256": carried["runtime_sha256"],
        "storage_layout": carried["storage_layout"],
    }
    write_whole(note_file, json.dumps(note, indent=1) + "\n")


def implementation(
    client: Coordinator,
    address: str | None = None,
) -> Found | None:
    """Return the implementation of the proxy at `address`; None: it is not an ERC-1967 proxy.

    `address` None: the coordinator's.
    """
    proxy = Web3.to_checksum_address(address or client.deployment.contract)
    with client.translated("eth_getStorageAt"):
        stored = client.web3.eth.get_storage_at(proxy, _SLOT)
    found = Web3.to_checksum_address(bytes(stored)[-20:])
    if found == contract.NO_ADDRESS:
        return None
    with client.translated("eth_getCode"):
        code = bytes(client.web3.eth.get_code(found))
    # A UUPS implementation carries its own address; the compiler leaves zeros there.
    own = bytes.fromhex(found[2:]).rjust(32, b"\0")
    code = code.replace(own, bytes(32))
    return Found(found, hashlib.sha256(code).hexdigest())


def _require_fitting(
    found: Found,
    target: Deployed,
    note_file: Path,
) -> None:
    """Raise ChainError unless our storage layout is compatible with that of `found`."""
    where = f"{target.address} runs {target.version} ({found.address})"
    known = _known(target.name, note_file)
    layouts = {note["runtime_sha256"]: note["storage_layout"] for note in known}
    if found.digest not in layouts:
        raise ChainError(
            f"{where}, which is neither a release nor what {note_file} names: its storage layout is"
            " not known, and an upgrade might destroy the contract's state; run the hivewright"
            " that deployed it, or restore that file"
        )
    ours = contract.artifact(target.name)["storage_layout"]
    broken = storage_layout.breaks(layouts[found.digest], ours)
    if broken:
        raise ChainError(
            f"{where}: an upgrade to {contract.carried_version(target.name)} would break its"
            f" storage layout and was not made: {'; '.join(broken)}; new variables must replace"
            " gap, and existing ones must not move"
        )


def _known(
    name: str,
    note_file: Path,
) -> list[dict[str, Any]]:
    notes = releases(name)
    if note_file.exists():
        notes.append(json.loads(note_file.read_text()))
    return notes


def releases(name: str = COORDINATOR) -> list[dict[str, Any]]:
    """Return version, runtime_sha256 and storage_layout of each released version of a contract."""
    folder = resources.files("worker.chain").joinpath("artifacts", "releases", name)
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return [json.loads(file.read_text()) for file in files]


def _upgrade(
    client: Coordinator,
    owner: LocalAccount,
    target: Deployed,
    patience_seconds: float,
) -> None:
    code = bytes.fromhex(contract.artifact(target.name)["bytecode"][2:])
    created = _send(client, owner, Call(target.name, code, None), patience_seconds)
    if created is None:
        raise ChainError(
            f"{target.name}: the receipt of its creation names no address; check chain.rpc_url"
        )
    upgrade = client.call("upgradeToAndCall(address,bytes)", created, b"")
    _send(client, owner, replace(upgrade, to=target.address), patience_seconds)
    client.check()


def _send(
    client: Coordinator, owner: LocalAccount, call: Call, patience_seconds: float
) -> str | None:
    """Send the call, with another nonce if the keeper has used ours (it has the same key).

    Returns the address of the contract that the call created; None if it created none.
    """
    for _ in range(_TRIES - 1):
        try:
            return client.transact(owner, call, patience_seconds).contract
        except NonceUsed:
            log.info("nonce used by the keeper, sending again call=%s", call.name)
    return client.transact(owner, call, patience_seconds).contract

"""The place of the chain: JSON-RPC address and contract, from settings, the deployment file or the
account service."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_abi.codec import ABICodec
from eth_abi.decoding import StringDecoder
from eth_abi.registry import ABIRegistry, BaseEquals
from web3 import Web3
from web3._utils.abi import build_strict_registry
from web3.exceptions import Web3Exception
from web3.middleware import ExtraDataToPOAMiddleware

from worker import settings
from worker.chain import http, rpc
from worker.chain.rpc import Rpc
from worker.errors import BadAnswer, ChainError, ChainUnreachable
from worker.log import printable

_FORMS = {"contract": r"0x[0-9a-fA-F]{40}", "rpc_url": r"https?://\S+"}


@dataclass(frozen=True, slots=True)
class Deployment:
    """The facts that every user of a swarm's chain needs: one JSON-RPC address of it or several,
    chain id, contract.

    `contract` is a checksummed address; `contract_block` the block in which it was made, None if
    nobody wrote it down.
    """

    rpc_urls: tuple[str, ...]
    chain_id: int
    contract: str
    contract_block: int | None = None

    @property
    def rpc_url(self) -> str:
        return self.rpc_urls[0]


def is_configured(chain: settings.Chain) -> bool:
    """Return whether the settings name a chain at all. If not, a node counts its rounds itself and
    earns nothing."""
    return any((chain.rpc_url, chain.deployment_file, chain.account_url))


def resolve(chain: settings.Chain) -> Deployment:
    """Find out where the chain is. The settings win over the deployment file, that over the account
    service.

    Raises ChainError if they contradict each other or leave something open, ChainUnreachable if the
    deployment file is not there yet or the account service does not answer.
    """
    if not is_configured(chain):
        raise ChainError(
            "no chain: chain.rpc_url, chain.deployment_file and chain.account_url are all empty;"
            " set one of them"
        )
    written = None
    if chain.deployment_file and not (chain.rpc_url and chain.contract):
        written = read_deployment(chain.deployment_file, chain.id)
    rpc_urls = chain.rpc_urls or (written.rpc_urls if written else (proxy_url(_base(chain)),))
    if chain.contract:
        contract = chain.contract
    elif written:
        contract = written.contract
    elif chain.account_url:
        contract = _ask_account(chain)
    else:
        raise ChainError(
            "no contract: chain.contract, chain.deployment_file and chain.account_url are all"
            " empty; set one of them (`hivewright chain deploy` writes a deployment file, and says"
            " where)"
        )
    block = chain.contract_block
    if block is None and written and contract == written.contract:
        block = written.contract_block
    return Deployment(rpc_urls, chain.id, Web3.to_checksum_address(contract), block)


def read_deployment(path: Path, chain_id: int) -> Deployment:
    """Read what `hivewright chain deploy` wrote. ChainUnreachable if it is not there yet,
    ChainError if it is wrong."""
    source = f"{path} (chain.deployment_file)"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ChainUnreachable(
            f"{source}: not there yet; `hivewright chain deploy` writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ChainError(
            f"{source}: can't be read: {error}; `hivewright chain deploy` writes it"
        ) from None
    contract, found_id, rpc_url = _checked(raw, source, ("contract", "chain_id", "rpc_url"))
    _expect_id(found_id, chain_id, source)
    block = raw.get("contract_block")  # files of before this was written have none
    is_block = isinstance(block, int) and not isinstance(block, bool) and block >= 0
    place = _socket_in(raw) or rpc_url
    return Deployment((place,), chain_id, contract, block if is_block else None)


def _socket_in(written: dict[str, Any]) -> str | None:
    """The embedded chain's socket as an address, where its folder is: on the chain's host, for the
    chain's own roles.

    Files of the version before name none.
    """
    path = written.get("socket")
    return f"{http.UNIX}{path}" if isinstance(path, str) and Path(path).parent.is_dir() else None


def connect(rpc_url: str | Rpc, timeout_seconds: float) -> Web3:
    """A client whose requests end within about `timeout_seconds`, tries included. Nothing is sent
    yet."""
    web3 = Web3(Rpc([rpc_url], "", None, timeout_seconds) if isinstance(rpc_url, str) else rpc_url)
    # Proof-of-authority chains put signatures where web3 expects at most 32 bytes.
    web3.middleware_onion.inject(ExtraDataToPOAMiddleware, layer=0)
    web3.codec = ABICodec(_lenient_registry())
    return web3


def _lenient_registry() -> ABIRegistry:
    r"""web3's own, but text that is not UTF-8 is read with \xNN in it: a contract takes any bytes
    as a peer id, and one untrusted peer's must not end the reading of everybody's."""
    registry = build_strict_registry()
    registry.unregister_decoder("string")
    decoder = StringDecoder("backslashreplace")  # type: ignore[no-untyped-call]
    registry.register_decoder(BaseEquals("string"), decoder, "string")  # type: ignore[no-untyped-call]
    return registry


@contextmanager
def translated(url: str, timeout_seconds: float) -> Iterator[None]:
    """Turn what requests and web3 raise about the connection to `url` into ChainUnreachable and
    ChainError."""
    try:
        with rpc.translated(url, timeout_seconds):
            yield
    except Web3Exception as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise BadAnswer(f"{url}: {reason}; check that this is the right chain") from error


def proxy_url(account_url: str) -> str:
    """Return where the account service passes JSON-RPC on."""
    return f"{account_url.rstrip('/')}/rpc"


def _base(chain: settings.Chain) -> str:
    return (chain.account_url or "").rstrip("/")


def _ask_account(chain: settings.Chain) -> str:
    url = f"{_base(chain)}/api/swarm"
    with translated(f"{url} (chain.account_url)", chain.timeout_seconds):
        with http.open_session() as session:
            answer = session.get(url, timeout=chain.timeout_seconds)
        answer.raise_for_status()
        raw = answer.json()
    source = f"{url} (chain.account_url)"
    contract, found_id = _checked(raw, source, ("contract", "chain_id"))
    _expect_id(found_id, chain.id, source)
    return str(contract)


def _checked(raw: Any, source: str, keys: tuple[str, ...]) -> list[Any]:
    for key in keys:
        value = raw.get(key) if isinstance(raw, dict) else None
        if key == "chain_id":
            is_valid = isinstance(value, int) and not isinstance(value, bool)
        else:
            is_valid = isinstance(value, str) and re.fullmatch(_FORMS[key], value) is not None
        if not is_valid:
            shown = printable(repr(value))[:80]
            raise ChainError(
                f"{source}: {key} is {shown}; expected {', '.join(keys)} of a swarm's chain"
            )
    return [raw[key] for key in keys]


def _expect_id(found: int, expected: int, source: str) -> None:
    if found != expected:
        raise ChainError(
            f"chain id {found} in {source}, expected {expected} (chain.id); point one of them at"
            " the other"
        )

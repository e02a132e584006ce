"""Locate the chain: JSON-RPC addresses and contract.

They come from the settings, the deployment file or the account service.
"""

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
    """A swarm's chain: its JSON-RPC addresses, id and contract.

    `contract` is a checksummed address; `contract_block` is the block that created it, None if it
    is not recorded. `market` is the prediction market's address as recorded with it, None if there
    is none.
    """

    rpc_urls: tuple[str, ...]
    chain_id: int
    contract: str
    contract_block: int | None = None
    market: str | None = None

    @property
    def rpc_url(self) -> str:
        return self.rpc_urls[0]


def is_configured(chain: settings.Chain) -> bool:
    """Return whether the settings name a chain; a node without one counts rounds itself, unpaid."""
    return any((chain.rpc_url, chain.deployment_file, chain.account_url))


def resolve(chain: settings.Chain) -> Deployment:
    """Locate the chain: settings take precedence over the deployment file, that over the service.

    Raises ChainError if they contradict each other or are incomplete, ChainUnreachable if the
    deployment file does not exist yet or the account service does not answer.
    """
    if not is_configured(chain):
        raise ChainError(
            "no chain: chain.rpc_url, chain.deployment_file and chain.account_url are all empty;"
            " set one of them"
        )
    written = None
    if chain.deployment_file and not (chain.rpc_url and chain.contract):
        written = read_deployment(chain.deployment_file, chain.id)
    rpc_urls = chain.rpc_urls
    if not rpc_urls and written:
        rpc_urls = written.rpc_urls
    if not rpc_urls:
        rpc_urls = (proxy_url(chain.account_url or ""),)
    contract = _contract(chain, written)
    block = chain.contract_block
    if block is None and written and contract == written.contract:
        block = written.contract_block
    market = written.market if written and contract == written.contract else None
    return Deployment(rpc_urls, chain.id, Web3.to_checksum_address(contract), block, market)


def _contract(
    chain: settings.Chain,
    written: Deployment | None,
) -> str:
    if chain.contract:
        return chain.contract
    if written:
        return written.contract
    if chain.account_url:
        return _ask_account(chain, chain.account_url)
    raise ChainError(
        "no contract: chain.contract, chain.deployment_file and chain.account_url are all empty;"
        " set one of them (`hivewright chain deploy` writes a deployment file, and says where)"
    )


def read_deployment(path: Path, chain_id: int) -> Deployment:
    """Read the file that `hivewright chain deploy` writes.

    Raises ChainUnreachable if it does not exist yet, ChainError if it is invalid.
    """
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
    block = raw.get("contract_block")  # files of earlier versions have none
    if not isinstance(block, int) or isinstance(block, bool) or block < 0:
        block = None
    place = _socket_in(raw) or rpc_url
    return Deployment((place,), chain_id, contract, block, address_in(raw, "market", source))


def address_in(
    raw: dict[str, Any],
    key: str,
    source: str,
) -> str | None:
    """Return the address under `key`; None if it is missing or null, as before there were markets.

    Raises ChainError, which names `source`, if it is not an address.
    """
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(_FORMS["contract"], value):
        shown = printable(repr(value))[:80]
        raise ChainError(f"{source}: {key} is {shown}; expected 0x and 40 hex digits")
    return Web3.to_checksum_address(value)


def _socket_in(written: dict[str, Any]) -> str | None:
    """Return the embedded chain's socket as an address, if its folder exists on this host.

    Only the chain's own roles can use it. Deployment files of earlier versions do not name one.
    """
    path = written.get("socket")
    if not isinstance(path, str) or not Path(path).parent.is_dir():
        return None
    return f"{http.UNIX}{path}"


def connect(rpc_url: str | Rpc, timeout_seconds: float) -> Web3:
    """Return a client whose requests end within about `timeout_seconds`, retries included.

    Nothing is sent yet.
    """
    if isinstance(rpc_url, str):
        rpc_url = Rpc([rpc_url], "", None, timeout_seconds)
    web3 = Web3(rpc_url)
    # Proof-of-authority chains put signatures where web3 expects at most 32 bytes.
    web3.middleware_onion.inject(ExtraDataToPOAMiddleware, layer=0)
    web3.codec = ABICodec(_lenient_registry())
    return web3


def _lenient_registry() -> ABIRegistry:
    r"""Return web3's registry, with text that is not UTF-8 decoded as \xNN escapes.

    A contract accepts any bytes as a peer id, and that of one untrusted peer must not make all
    others unreadable.
    """
    registry = build_strict_registry()
    registry.unregister_decoder("string")
    decoder = StringDecoder("backslashreplace")  # type: ignore[no-untyped-call]
    registry.register_decoder(BaseEquals("string"), decoder, "string")  # type: ignore[no-untyped-call]
    return registry


@contextmanager
def translated(
    url: str,
    timeout_seconds: float,
) -> Iterator[None]:
    """Translate exceptions of requests and web3 into ChainUnreachable and ChainError."""
    try:
        with rpc.translated(url, timeout_seconds):
            yield
    except Web3Exception as error:
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise BadAnswer(
            f"{url}: {printable(first_line)}; check that this is the right chain"
        ) from error


def proxy_url(account_url: str) -> str:
    """Return the address at which the account service forwards JSON-RPC."""
    return f"{account_url.rstrip('/')}/rpc"


def _ask_account(chain: settings.Chain, account_url: str) -> str:
    url = f"{account_url.rstrip('/')}/api/swarm"
    with translated(f"{url} (chain.account_url)", chain.timeout_seconds):
        with http.open_session() as session:
            answer = session.get(url, timeout=chain.timeout_seconds)
        answer.raise_for_status()
        raw = answer.json()
    source = f"{url} (chain.account_url)"
    contract, found_id = _checked(raw, source, ("contract", "chain_id"))
    _expect_id(found_id, chain.id, source)
    return str(contract)


def _checked(
    raw: Any,
    source: str,
    keys: tuple[str, ...],
) -> list[Any]:
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


def _expect_id(
    found: int,
    expected: int,
    source: str,
) -> None:
    if found != expected:
        raise ChainError(
            f"chain id {found} in {source}, expected {expected} (chain.id); point one of them at"
            " the other"
        )

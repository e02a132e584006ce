"""`hivewright chain fund`: give an account money on the embedded chain, from its host.

Hivewright needs none. Wallet clients of RL Swarm do: their gas price is fixed.
"""

import argparse
import re
from decimal import Decimal, InvalidOperation

from web3 import Web3
from web3.types import RPCEndpoint

from worker.chain import deployment, http
from worker.chain.embedded import door
from worker.errors import ChainUnreachable, SettingsError
from worker.settings import Settings

_MOST = Decimal(10**9)


def run(settings: Settings, options: argparse.Namespace) -> None:
    """Add `options.amount` (in ether) to the balance of `options.address`.

    Raises SettingsError for an invalid address or amount, ChainUnreachable if no embedded chain
    runs here.
    """
    if not re.fullmatch(r"0x[0-9a-fA-F]{40}", options.address):
        raise SettingsError(
            f"ADDRESS: got {options.address[:60]!r}; expected 0x and 40 hexadecimal digits"
        )
    try:
        amount = Decimal(options.amount)
    except InvalidOperation:
        amount = Decimal(0)
    if not amount.is_finite() or not 0 < amount <= _MOST:
        raise SettingsError(
            f"AMOUNT: got {options.amount[:60]!r}; expected a number above 0, in ether"
        )
    file = door.socket_of(settings.anvil)
    if not file.is_socket():
        raise ChainUnreachable(
            f"{file} (next to anvil.state_file): no embedded chain serves here; run this on its"
            " host, as root or as its user, with the chain's settings file"
        )
    url = f"{http.UNIX}{file}"
    web3 = deployment.connect(url, settings.chain.timeout_seconds)
    address = Web3.to_checksum_address(options.address)
    with deployment.translated(url, settings.chain.timeout_seconds):
        total = web3.eth.get_balance(address) + int(amount * 10**18)
        method = RPCEndpoint(door.FUND_METHOD)
        answer = web3.provider.make_request(method, [address, hex(total)])
    if "error" in answer:
        raise ChainUnreachable(f"{url}: {answer['error']}; see the chain's log")
    print(f"{address} has {Decimal(total) / 10**18:f} ether on chain {settings.chain.id}")

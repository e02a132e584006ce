"""The embedded chain: anvil in the foreground (`hivewright chain up`), and our contract on it.

anvil gives full control to anyone who reaches its port, so `up` puts a filter in front of it
(door.py). `deploy` (`hivewright chain deploy`) works on any chain in the settings, and calls no
`anvil_*` method.
"""

import functools
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from eth_account import Account
from eth_account.signers.local import LocalAccount
from web3 import Web3
from web3.types import Nonce, RPCEndpoint
from web3.utils.address import get_create_address

from worker import settings
from worker.chain import contract, deployment, http, upgrade
from worker.chain.client import Call
from worker.chain.coordinator import Coordinator
from worker.chain.deployment import Deployment
from worker.chain.embedded import door, pruning
from worker.chain.embedded.snapshots import Snapshots
from worker.chain.market import Market
from worker.errors import ChainError, ChainUnreachable, ResourceError, SecretError
from worker.runtime.files import HEX_KEY, read_secret, write_whole
from worker.runtime.host import require_port
from worker.runtime.processes import die_with_parent, exit_on_signals
from worker.runtime.systemd import progress, ready

log = logging.getLogger(__name__)

DEPLOYMENT_FILE = "deployment.json"
OWNER_KEY_FILE = "owner.key"
JUDGE_KEY_FILE = "judge.key"

_ROOT = Path(__file__).resolve().parents[3]
_GAS_LIMIT = 1_000_000_000
"""Gas limit of a block, so large that any number of transactions fits into one block."""
_STARTUP_SECONDS = 60.0
_STOP_SECONDS = 45.0
_LOOPBACK = "127.0.0.1"
_WATCH_SECONDS = 2.0
_HANG_SECONDS = 20.0
"""A chain hangs if it answers no read, or mines no pending transaction, for this many seconds."""
_STOP_HUNG_SECONDS = 3.0
_POOL_STATUS = RPCEndpoint("txpool_status")
_SOMEBODY = Web3.to_checksum_address("0x" + "00" * 20)


# ---- hivewright chain up


def up(settings: settings.Settings) -> None:
    """Run the chain until SIGTERM or SIGINT; its state is on disk when this ends.

    Writes the door's URL into `address` next to the state file once it serves. A chain that hangs
    is restarted. Raises ResourceError if the port is in use or there is no anvil, ChainError if
    anvil ends by itself.
    """
    exit_on_signals()
    inner = settings.anvil.model_copy(update={"host": _LOOPBACK, "port": 0})
    with door.opened(settings.anvil, settings.chain.id) as opened:
        while True:
            with running(inner, settings.chain.id) as (process, url):
                opened.target = url
                write_whole(_address_file(inner), opened.url)
                log.info(
                    "chain up rpc=%s chain_id=%d state=%s",
                    opened.url,
                    settings.chain.id,
                    inner.state_file,
                )
                ready()
                try:
                    reason = _watch(process, url, inner.state_file)
                finally:
                    opened.target = None
            log.info("chain restarts: %s state=%s", reason, inner.state_file)


def _watch(
    process: subprocess.Popen[bytes],
    url: str,
    state_file: Path,
) -> str:
    """Watch the chain until it must be restarted, and return why. One that hangs is killed.

    Raises ChainError if it ends by itself.
    """
    size_before = pruning.megabytes(state_file)
    pulse, growth = Pulse(url), pruning.Growth(state_file)
    while process.poll() is None:
        if pruning.has_outgrown(state_file, size_before):
            return "its state has grown; old blocks are pruned at the restart"
        hung = pulse.look()
        if hung is not None and process.poll() is None:
            log.error("chain hangs, killing it: %s", hung)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_HUNG_SECONDS)
            process.kill()
            process.wait()
            return "it hung"
        growth.look()
        if hung is None:
            progress(f"block {pulse.block}, state {pruning.megabytes(state_file):.0f} MB")
        sleep(_WATCH_SECONDS)
    raise ChainError(
        f"anvil ended by itself with code {process.returncode}; see its output above in the log"
    )


class Pulse:
    """Detect a chain that hangs: it must answer reads of its state, and mine pending transactions.

    A chain that executes an endless call does neither, but still answers its block number.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._web3 = deployment.connect(url, _HANG_SECONDS / 2)
        self.block = -1
        self._lively_at = monotonic()

    def look(self) -> str | None:
        """Poll the chain; return the problem if it has lasted for _HANG_SECONDS."""
        try:
            wrong = self._wrong()
        except ChainError as error:
            wrong = str(error)
        if wrong is None:
            self._lively_at = monotonic()
        return wrong if monotonic() - self._lively_at > _HANG_SECONDS else None

    def _wrong(self) -> str | None:
        with deployment.translated(self._url, _HANG_SECONDS / 2):
            block = int(self._web3.eth.block_number)
            pool = self._web3.provider.make_request(_POOL_STATUS, [])["result"]
            num_pending = int(pool["pending"], 16)
            self._web3.eth.get_balance(_SOMEBODY)
        is_mining = not num_pending or block != self.block
        self.block = block
        if is_mining:
            return None
        return f"{num_pending} transactions are pending, and no block came after block {block}"


@contextmanager
def running(
    anvil: settings.Anvil,
    chain_id: int,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run anvil as a child process, and yield it and its URL.

    It starts with only the history that is to be kept. Its state is written every second (a large
    one less often) and at the end of the `with` block, which raises ResourceError if that fails.
    """
    require_port(anvil.host, anvil.port, "anvil.port")
    port = anvil.port or free_port(anvil.host)
    snapshots = Snapshots(anvil.state_file)
    snapshots.start()
    try:
        pruning.cut(anvil.state_file, anvil.history_blocks)
        process = subprocess.Popen(
            [*_command(anvil, port, chain_id), "--dump-state", snapshots.draft],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=functools.partial(_end_with_parent, os.getpid()),
        )
        try:
            url = f"http://{anvil.host}:{port}"
            _wait_until_serving(process, url)
            yield process, url
        finally:
            _end(process)
    finally:
        snapshots.stop()


def _command(
    anvil: settings.Anvil,
    port: int,
    chain_id: int,
) -> list[str]:
    options: dict[str, object] = {
        "--host": anvil.host,
        "--port": port,
        # The state file does not include it: a restart with another id makes another chain.
        "--chain-id": chain_id,
        "--state-interval": pruning.dump_seconds(anvil.state_file),
        "--prune-history": pruning.kept_states(anvil.state_file),
        "--transaction-block-keeper": anvil.history_blocks,
        "--accounts": 0,
        # A transaction gets a block at once; without any, one is mined at this interval. With 2
        # seconds or less anvil ignores --prune-history and keeps 1,500 states.
        "--block-time": anvil.block_seconds,
        "--gas-limit": _GAS_LIMIT,
        "--gas-price": 0,
        "--block-base-fee-per-gas": 0,
    }
    if anvil.state_file.exists():
        options["--load-state"] = anvil.state_file
    flags = ["--mixed-mining", "--no-priority-fee", "--no-cors", "--quiet"]
    return [
        str(_binary(anvil)),
        *(str(word) for option in options.items() for word in option),
        *flags,
    ]


def _binary(anvil: settings.Anvil) -> Path:
    place = anvil.binary or _ROOT / ".cache/node/anvil"
    if place.is_file():
        return place
    found = None if anvil.binary else shutil.which("anvil")
    if found is None:
        raise ResourceError(
            f"no anvil at {place} (anvil.binary); `scripts/anvil FOLDER` installs it and prints"
            " where"
        )
    return Path(found)


def free_port(host: str) -> int:
    """Return a port that is free now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _end_with_parent(parent: int) -> None:
    """End anvil when hivewright ends, even by SIGKILL, so that none keeps the port."""
    if not die_with_parent(parent, signal.SIGTERM):
        os._exit(1)


def _wait_until_serving(
    process: subprocess.Popen[bytes],
    url: str,
) -> None:
    web3 = deployment.connect(url, _WATCH_SECONDS)
    deadline = monotonic() + _STARTUP_SECONDS
    while not web3.is_connected():
        if process.poll() is not None:
            raise ChainError(
                f"anvil ended with code {process.returncode} before it served {url}; see its"
                " output above in the log"
            )
        if monotonic() > deadline:
            raise ChainError(
                f"anvil does not serve {url} after {_STARTUP_SECONDS:g} s; see whether its state"
                " file is too large"
            )
        sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        log.warning("anvil killed after=%gs; changes since its last dump are lost", _STOP_SECONDS)
        process.kill()
        process.wait()


# ---- hivewright chain deploy


def deploy(settings: settings.Settings) -> Deployment:
    """Deploy the contract, or find the one that was deployed before and upgrade it in place.

    Creates the owner's key in `keeper.state_dir` if there is none, writes deployment.json next to
    it and prints it. With `chain.contract` set, that contract is used and none is created. Raises
    ChainUnreachable if there is no chain, ChainError if the chain lacks the contract in
    deployment.json, or an upgrade would break its state.
    """
    file = settings.keeper.state_dir / DEPLOYMENT_FILE
    rpc_url = _rpc_url(settings)
    address = settings.chain.contract
    if address is None and file.exists():
        address = deployment.read_deployment(file, settings.chain.id).contract
        if not _client(settings, rpc_url, address).has_code(address):
            raise ChainError(
                f"{file} names the contract {address}, and chain {settings.chain.id} at {rpc_url}"
                " has none there: the chain lost its state, or is another one; restore the state"
                f" (anvil.state_file), or move {DEPLOYMENT_FILE} away and deploy again: a new"
                " swarm from round 0"
            )
    block = None
    if address is None:
        owner = load_owner(settings.keeper, create=True)
        proxy_code = contract.proxy_data(owner.address, get_create_address(owner.address, Nonce(0)))
        address, block = _create(
            _client(settings, rpc_url, contract.NO_ADDRESS),
            owner,
            "SwarmCoordinator",
            proxy_code,
            settings.chain.timeout_seconds,
        )
    client = _client(settings, rpc_url, address)
    client.check()
    _upgrade(settings, client)
    found = client.deployment
    written: dict[str, object] = {
        "rpc_url": _shown_url(settings),
        "chain_id": found.chain_id,
        "contract": found.contract,
    }
    # Earlier versions did not record the block: search for it; 0: not found.
    block = block or _written_block(file, found) or client.first_block()
    if block:
        written["contract_block"] = block
    market = _deploy_market(settings, client)
    if market is not None:
        written["market"] = market
    if found.rpc_url.startswith(http.UNIX):
        written["socket"] = found.rpc_url.removeprefix(http.UNIX)
    text = json.dumps(written)
    write_whole(file, text + "\n")
    print(text)
    return found


def _written_block(file: Path, found: Deployment) -> int | None:
    """Return the contract's first block as recorded by an earlier deploy of the same contract."""
    if not file.exists():
        return None
    written = deployment.read_deployment(file, found.chain_id)
    if written.contract.lower() != found.contract.lower():
        return None
    return written.contract_block


def _upgrade(settings: settings.Settings, client: Coordinator) -> None:
    """Upgrade the contract, if we have its owner's key."""
    if not (settings.keeper.state_dir / OWNER_KEY_FILE).exists():
        return
    note_file = settings.keeper.state_dir / upgrade.NOTE_FILE
    before = client.version
    upgrade.bring_up_to_date(
        client, load_owner(settings.keeper), note_file, settings.chain.timeout_seconds
    )
    if client.version != before:
        print(
            f"upgraded {client.deployment.contract} from {before} to {client.version}",
            file=sys.stderr,
        )


def _deploy_market(
    settings: settings.Settings,
    client: Coordinator,
) -> str | None:
    """Deploy the prediction market, or upgrade it in place; return its address.

    None: the settings disable it. Its address depends on the judge's key, whose account creates it,
    so that an interrupted deploy continues where it stopped.
    """
    wanted = settings.market.enabled
    if wanted is None:
        wanted = _is_embedded(settings)
    if not wanted:
        return None
    judge = load_key(settings.keeper.state_dir / JUDGE_KEY_FILE, "judge", create=True)
    implementation = get_create_address(judge.address, Nonce(0))
    coordinator, patience = client.deployment.contract, settings.chain.timeout_seconds
    proxy_code = contract.market_proxy_data(coordinator, judge.address, implementation)
    address, _ = _create(client, judge, "PredictionMarket", proxy_code, patience)
    if (settings.keeper.state_dir / OWNER_KEY_FILE).exists():
        target = upgrade.Deployed("PredictionMarket", address, Market(client, address).version)
        note_file = settings.keeper.state_dir / upgrade.MARKET_NOTE_FILE
        owner = load_owner(settings.keeper)
        upgrade.bring_up_to_date(client, owner, note_file, patience, target)
    return address


def load_owner(
    keeper: settings.Keeper,
    create: bool = False,
) -> LocalAccount:
    """Return the account that owns the contract.

    Raises ChainError if its key is missing and `create` is False.
    """
    return load_key(keeper.state_dir / OWNER_KEY_FILE, "owner", create)


def load_key(
    file: Path,
    role: str,
    create: bool = False,
) -> LocalAccount:
    """Return the account whose key is in `file`; `role` names it in messages.

    Raises ChainError if it is missing and `create` is False, SecretError if it is not a key.
    """
    if create and not file.exists():
        write_whole(file, "0x" + secrets.token_hex(32) + "\n", mode=0o600)
        log.info("%s key made file=%s", role, file)
    if not file.exists():
        raise ChainError(
            f"{file}: no {role} key; `hivewright chain deploy` makes it, or restore it from a"
            " backup"
        )
    expected = f"the key of the contract's {role}; restore it from its backup"
    key = read_secret(file, expected, form=HEX_KEY)
    try:
        account: LocalAccount = Account.from_key(key)
    except ValueError:
        raise SecretError(f"{file}: no key of an account; expected {expected}") from None
    return account


def _create(
    client: Coordinator,
    owner: LocalAccount,
    name: str,
    proxy_code: bytes,
    patience: float,
) -> tuple[str, int | None]:
    """Deploy implementation and proxy of a contract as the owner's first two transactions.

    Returns the proxy and its block; the block is None if the proxy existed. Their addresses depend
    on owner and nonce, so an interrupted deploy continues where it stopped.
    """
    client.check_id()
    implementation = get_create_address(owner.address, Nonce(0))
    proxy = get_create_address(owner.address, Nonce(1))
    code = bytes.fromhex(contract.artifact(name)["bytecode"][2:])
    parts = (
        (implementation, Call(name, code, None)),
        (proxy, Call("ERC1967Proxy", proxy_code, None)),
    )
    block = None
    for nonce, (address, creation) in enumerate(parts):
        if client.has_code(address):
            continue
        if client.nonce(owner.address) != nonce:
            raise ChainError(
                f"the account {owner.address} has sent other transactions on this chain; expected"
                f" a new one for the {name}; move its key away ({OWNER_KEY_FILE} or"
                f" {JUDGE_KEY_FILE}) and deploy again"
            )
        block = client.transact(owner, creation, patience).block
        log.info("deployed %s address=%s", creation.name, address)
    return str(proxy), block


def _client(
    settings: settings.Settings,
    rpc_url: str,
    address: str,
) -> Coordinator:
    place = {"rpc_url": rpc_url, "contract": address}
    return Coordinator(settings.chain.model_copy(update=place))


def _rpc_url(settings: settings.Settings) -> str:
    """Return chain.rpc_url, or the embedded chain's socket, which allows contract creation."""
    url, private = _shown_url(settings), door.socket_of(settings.anvil)
    return f"{http.UNIX}{private}" if _is_embedded(settings) and private.exists() else url


def _is_embedded(settings: settings.Settings) -> bool:
    """Return whether the chain in the settings is the embedded one of this host."""
    file = _address_file(settings.anvil)
    embedded_url = file.read_text().strip() if file.exists() else None
    return not settings.chain.rpc_url or _shown_url(settings) == embedded_url


def _shown_url(settings: settings.Settings) -> str:
    """Return the chain's HTTP URL, which earlier versions can read too."""
    if settings.chain.rpc_url:
        return settings.chain.rpc_urls[0]
    if settings.anvil.port:
        return f"http://{settings.anvil.host}:{settings.anvil.port}"
    try:
        return _address_file(settings.anvil).read_text().strip()
    except FileNotFoundError:
        raise ChainUnreachable(
            "no chain.rpc_url, and no `hivewright chain up` has run here; start the chain first"
        ) from None


def _address_file(anvil: settings.Anvil) -> Path:
    return anvil.state_file.parent / "address"

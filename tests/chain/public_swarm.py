"""A swarm with a long history on a chain that is reached through public addresses."""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from account_service import eventually
from conftest import Chain
from public_rpc import mine

from worker import settings
from worker.chain import coordinator
from worker.chain import keeper as keeper_module
from worker.chain.coordinator import Coordinator
from worker.chain.embedded import anvil
from worker.chain.keeper import Keeper
from worker.chain.rpc import Rpc

BEFORE, AFTER = 120, 30
"""Blocks before the contract was created, and after."""


@pytest.fixture(name="old_chain", scope="session")
def public_old_chain(anvil_binary: Path) -> Iterator[str]:
    """Run an anvil that keeps all state, with a long history."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = [
        "--accounts",
        "0",
        "--gas-price",
        "0",
        "--block-base-fee-per-gas",
        "0",
        "--no-priority-fee",
        "--quiet",
    ]
    command = [
        anvil_binary,
        "--port",
        str(port),
        "--chain-id",
        "31337",
        "--gas-limit",
        "1000000000",
        *options,
    ]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: Rpc([url], "", None, 2.0).is_connected())
            mine(url, BEFORE)
            yield url
        finally:
            process.terminate()


@pytest.fixture(name="swarm")
def public_swarm(old_chain: str, tmp_path: Path) -> Chain:
    """Deploy a contract with two peers that reported in two rounds, and many later blocks."""
    raw = {
        "chain": {
            "rpc_url": old_chain,
            "deployment_file": str(tmp_path / "keeper/deployment.json"),
        },
        "keeper": {"state_dir": str(tmp_path / "keeper"), "poll_seconds": 0.05},
        "audit": {"every_rounds": 0},
    }
    parsed = settings.parse(raw, "test")
    deployment = anvil.deploy(parsed)
    client = Coordinator(parsed.chain)
    client.check()
    made = Chain(parsed, deployment, anvil.load_owner(parsed.keeper), client)
    account = made.new_account("a", "b")
    for round in (0, 1):
        for peer in ("a", "b"):
            made.send(account, client.submit_reward(round, 0, 100 * (round + 1), peer))
        made.send(account, client.submit_winners(round, ["b"], "a"))
        made.advance()
    mine(old_chain, AFTER)
    return made


def through(swarm: Chain, *urls: str, **changes: object) -> settings.Settings:
    """Return settings of a role that knows the chain by these addresses only."""
    chain = {
        "rpc_url": urls,
        "deployment_file": None,
        "contract": swarm.deployment.contract,
        "timeout_seconds": 4.0,
        "poll_seconds": 0.1,
        **changes,
    }
    return swarm.settings.model_copy(
        update={"chain": swarm.settings.chain.model_copy(update=chain)}
    )


def client_through(swarm: Chain, *urls: str, **changes: object) -> Coordinator:
    return Coordinator(through(swarm, *urls, **changes).chain)


@contextmanager
def keeping(of: settings.Settings) -> Iterator[threading.Thread]:
    """Run the keeper's loop in a thread, which must be alive at the end."""
    ended: list[BaseException] = []
    keeper = Keeper(of)
    stop = threading.Event()

    def keep() -> None:
        try:
            keeper.keep()
        except _Stop:
            pass
        except Exception as error:  # noqa: BLE001 - shown at the end
            ended.append(error)

    def pause(seconds: float) -> None:
        if stop.wait(min(seconds, 0.1)):
            raise _Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper_module, "time", SimpleNamespace(time=time.time, sleep=pause))
        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield thread
            assert not ended, ended
        finally:
            stop.set()
            thread.join(20)


class _Stop(Exception):
    pass


@pytest.fixture(name="forgetful")
def public_forgetful(monkeypatch) -> None:
    """Clear what this process learned of contracts through other clients."""
    monkeypatch.setattr(coordinator, "_FIRST_BLOCKS", {})

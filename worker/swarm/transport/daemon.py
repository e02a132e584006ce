"""libp2p's daemon (`p2pd`, from hivemind's wheel) as our child process.

The daemon dies with the process that started it, however that ends: the kernel sends it SIGKILL. We
connect it to bootnodes after its start (dht.py), because with `-bootstrapPeers` it exits if none of
them answers. hivemind's own code to start it is not used, because that starts a second daemon with
a fixed timeout first, and silently creates a missing identity.
"""

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cachetools import LRUCache
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from worker import settings
from worker.errors import SwarmError
from worker.multiaddr import P2P, RELAYED
from worker.runtime.processes import is_running
from worker.swarm.identity import varint
from worker.swarm.transport.address_ranking import inner_hosts, ranked

# On import hivemind sets up a log handler of its own and renames WARNING to WARN.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")

log = logging.getLogger(__name__)

PROTOCOL = "/hivewright/exchange"
"""The protocol that hivewright's peers answer; other libp2p and hivemind nodes do not."""
P2PD = Path(str(files("hivemind.hivemind_cli") / "p2pd"))
CONTROL_TIMEOUT_SECONDS = 5.0
STOP_TIMEOUT_SECONDS = 3.0
MAX_PEERS_MET = 512

# This process becomes p2pd after prctl(PR_SET_PDEATHSIG, SIGKILL), which survives exec. It exits if
# the parent died before that call.
_GUARD = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)

_P2P_CODE = b"\xa5\x03"  # of /p2p/ in multiaddrs: 421 as a varint

_FOLDER_PREFIX = "hivewright-p2pd-"

Handler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Serves one incoming stream; the string is the caller's peer id, authenticated by libp2p."""


class Daemon:
    """One running p2pd.

    Every method raises SwarmError if the daemon refuses or is gone, TimeoutError if it does not
    answer.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._server: asyncio.Server | None = None
        self._streams: set[asyncio.Task[None]] = set()
        self._output: asyncio.Task[None] | None = None
        self._last_line = ""
        self._said_ready = asyncio.Event()
        # The peers that we connected to last.
        self._met: LRUCache[str, None] = LRUCache(MAX_PEERS_MET)
        self.died = asyncio.Event()
        self.control = f"/unix{folder}/control.sock"
        self.peer_id = ""
        self.addresses: tuple[str, ...] = ()

    @classmethod
    async def start(
        cls,
        identity_file: Path,
        swarm: settings.Swarm,
        port: int,
        relays: Sequence[str] = (),
    ) -> "Daemon":
        """Start p2pd on the settings' host and `port`, and wait until it answers.

        Port 0: the kernel chooses. `relays`: the result of relays.find. It must be called in a
        thread that lives as long as the daemon.
        """
        # Mode 0700, and a short path: a socket's path has at most 108 bytes.
        _remove_leftovers()
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-"))
        place = [f"-listen=/unix{folder}/control.sock", f"-id={identity_file}"]
        arguments = [*place, *_arguments(folder, swarm, port, relays)]
        # The death signal is tied to the thread that forks: this one, which runs the event loop as
        # long as the daemon.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(P2PD), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # With one core it takes half the processor time that it takes with two, and is as fast.
            env={"GOLOG_LOG_LEVEL": "error", "GOMAXPROCS": "1"},
            # Ctrl-C at the terminal goes to the worker alone, which then stops its daemon.
            start_new_session=True,
        )
        daemon = cls(process, folder)
        daemon._output = asyncio.create_task(daemon._read_output())
        try:
            async with asyncio.timeout(swarm.startup_timeout_seconds):
                await daemon._get_ready()
        except TimeoutError:
            seconds = f"{swarm.startup_timeout_seconds:g} s (swarm.startup_timeout_seconds)"
            raise SwarmError(f"libp2p daemon: not ready after {seconds}; trying again") from None
        finally:
            if not daemon.peer_id:
                await daemon.stop()
        return daemon

    async def stop(self) -> None:
        """End the daemon and every stream. Takes STOP_TIMEOUT_SECONDS at most."""
        if self._server is not None:
            self._server.close()
        for task in self._streams:
            task.cancel()
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
                await self.died.wait()
        except TimeoutError:
            self._process.kill()
            await self.died.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def death_notice(self) -> str:
        """Return the exit status and the last output of a daemon that died."""
        return f"libp2p daemon ended with {self._process.poll()}: {self._last_line or 'no output'}"

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Pass every incoming stream of `protocol` to `handler`, each in a task of its own."""
        path = self._folder / "streams.sock"

        def accept(
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
        ) -> None:
            task = asyncio.create_task(self._handle(handler, reader, writer))
            self._streams.add(task)
            task.add_done_callback(self._handled)

        self._server = await asyncio.start_unix_server(accept, path)
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_HANDLER,
            streamHandler=p2pd_pb2.StreamHandlerRequest(
                addr=Multiaddr(f"/unix{path}").to_bytes(), proto=[protocol], balanced=False
            ),
        )
        await self._call(request)

    async def connect(
        self,
        peer_id: str,
        addresses: Sequence[str],
        timeout_seconds: float,
    ) -> None:
        """Connect to the peer.

        It is dialled at one of `addresses`; if there are none, at those in libp2p's own DHT.
        """
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(
                peer=_peer_bytes(peer_id),
                addrs=_address_bytes(addresses),
                timeout=max(1, round(timeout_seconds)),
            ),
        )
        self._met.pop(peer_id, None)
        await self._call(request, timeout_seconds)
        self._met[peer_id] = None

    def has_met(self, peer_id: str) -> bool:
        """Return whether `connect` reached this peer and `disconnect` was not called since."""
        return peer_id in self._met

    async def disconnect(self, peer_id: str) -> None:
        """Drop the connections to the peer: the next `connect` dials again."""
        self._met.pop(peer_id, None)
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.DISCONNECT,
            disconnect=p2pd_pb2.DisconnectRequest(peer=_peer_bytes(peer_id)),
        )
        await self._call(request)

    async def connections(self) -> dict[str, bool]:
        """Return the connected peers, bootnodes included.

        The value is True if a connection does not go through a relay.
        """
        response = await self._call(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        found: dict[str, bool] = {}
        for connection in response.peers:
            peer_id = _peer_id(connection.id)
            is_direct = any(RELAYED not in a for a in _readable(connection.addrs[:1]))
            found[peer_id] = found.get(peer_id, False) or is_direct
        return found

    async def find_addresses(self) -> tuple[str, ...]:
        """Return our addresses that libp2p knows by now, the best first.

        Relays and routers add more later.
        """
        response = await self._identify()
        return _sorted(response.identify.addrs)

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_seconds: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a new stream to a peer. The caller closes the writer."""
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(
                peer=_peer_bytes(peer_id), proto=[protocol], timeout=max(1, round(timeout_seconds))
            ),
        )
        _, reader, writer = await self._exchange(request, timeout_seconds)
        return reader, writer

    async def _get_ready(self) -> None:
        await self._said_ready.wait()
        if self.died.is_set():
            raise SwarmError(self.death_notice)
        response = await self._identify()
        self.addresses = _sorted(response.identify.addrs)
        self.peer_id = _peer_id(response.identify.id)

    async def _identify(self) -> Any:
        return await self._call(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))

    async def _read_output(self) -> None:
        """Read the daemon's output until its end, which sets `died`."""
        output, rest = asyncio.StreamReader(), b""
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), self._process.stdout
        )
        while chunk := await output.read(65536):
            *lines, rest = (rest[-65536:] + chunk).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text.startswith("Peer ID:"):
                    self._said_ready.set()
                elif text:
                    self._last_line = text[:300]
                    log.debug("daemon says %s", self._last_line)
        await asyncio.to_thread(self._process.wait)
        self.died.set()
        self._said_ready.set()

    async def _handle(
        self,
        handler: Handler,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            stream = p2pd_pb2.StreamInfo()
            await read_pbmsg_safe(reader, stream)
            await handler(_peer_id(stream.peer), reader, writer)
        finally:
            writer.close()

    def _handled(self, task: "asyncio.Task[None]") -> None:
        self._streams.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("serving a stream failed", exc_info=task.exception())

    async def _call(
        self,
        request: Any,
        timeout_seconds: float = CONTROL_TIMEOUT_SECONDS,
    ) -> Any:
        response, _, writer = await self._exchange(request, timeout_seconds)
        writer.close()
        return response

    async def _exchange(
        self, request: Any, timeout_seconds: float
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        writer = None
        response = p2pd_pb2.Response()
        try:
            async with asyncio.timeout(timeout_seconds):
                reader, writer = await asyncio.open_unix_connection(self._folder / "control.sock")
                data = request.SerializeToString()
                # In one call: hivemind's write_pbmsg makes a system call for each byte.
                writer.write(varint(len(data)) + data)
                await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise SwarmError(f"libp2p: {response.error.msg}")
            connection, writer = writer, None
            return response, reader, connection
        except TimeoutError:
            raise TimeoutError(f"libp2p: no answer within {timeout_seconds:.1f} s") from None
        except (OSError, EOFError) as error:
            raise SwarmError(f"libp2p daemon does not answer: {error}") from None
        finally:
            if writer is not None:
                writer.close()


def speaks_otherwise(error: BaseException) -> bool:
    """Return whether libp2p reached a peer that does not know our protocol."""
    return "protocols not supported" in str(error)


def multiaddr(host: str, port: int) -> str:
    """Return the libp2p address of a TCP port; `host` is an IP address or a name."""
    for family, protocol in ((socket.AF_INET, "ip4"), (socket.AF_INET6, "ip6")):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return f"/{protocol}/{host}/tcp/{port}"
    return f"/dns/{host}/tcp/{port}"


# Cached, because each request converts a peer id, and hivemind's base 58 is slow Python.
@lru_cache(1024)
def _peer_id(data: bytes) -> str:
    return str(PeerID(data).to_base58())


@lru_cache(1024)
def _peer_bytes(peer_id: str) -> bytes:
    try:
        return bytes(PeerID.from_base58(peer_id).to_bytes())
    except ValueError:
        raise SwarmError(f"peer id {peer_id}: not base 58") from None


def _address_bytes(addresses: Sequence[str]) -> list[bytes]:
    """Return the addresses in libp2p's binary form, without those that it does not understand."""
    encoded = []
    for address in addresses:
        try:
            encoded.append(_encode(address))
        except (ValueError, LookupError, SwarmError) as error:
            log.debug("address ignored address=%s reason=%s", address, error)
    return encoded


def _encode(address: str) -> bytes:
    """Return an address as p2pd parses it.

    hivemind writes a peer id in it (that of a relay) in a form that p2pd refuses.
    """
    direct, *relayed = address.split(P2P)
    data = bytes(Multiaddr(direct).to_bytes())
    for part in relayed:
        peer_id, slash, rest = part.partition("/")
        peer = _peer_bytes(peer_id)
        data += _P2P_CODE + bytes([len(peer)]) + peer
        if rest:
            data += bytes(Multiaddr(slash + rest).to_bytes())
    return data


def _arguments(
    folder: Path,
    swarm: settings.Swarm,
    port: int,
    relays: Sequence[str],
) -> list[str]:
    """Return p2pd's command line for the settings. May write a file into its folder."""
    arguments = [
        f"-hostAddrs={multiaddr(swarm.host, port)}",
        "-dhtServer=1",
        "-connManager=1",
        "-autonat=1",  # turns hole punching on too
        f"-natPortMap={int(swarm.map_port)}",
        f"-relayService={int(swarm.relay_others)}",
    ]
    if not swarm.relay_others and not relays:
        # By default p2pd relays for anybody, and no flag turns that off. Peers at relays can
        # still be reached.
        (folder / "config.json").write_text('{"Relay": {"Enabled": false}}')
        arguments += [f"-f={folder}/config.json", "-relay=0"]
    if swarm.announce:
        arguments.append(f"-announceAddrs={','.join(swarm.announce)}")
    if swarm.reachability != "auto":
        arguments.append(f"-forceReachability{swarm.reachability.capitalize()}=1")
    if relays:
        arguments += ["-autoRelay=1", "-relayDiscovery=0", f"-trustedRelays={','.join(relays)}"]
    return arguments


def _sorted(addresses: Iterable[bytes]) -> tuple[str, ...]:
    """Return addresses as text, in the order of `address_ranking.ranked`.

    Addresses that no other machine can reach are left out.
    """
    return ranked(_readable(addresses), inner_hosts())


def _readable(addresses: Iterable[bytes]) -> list[str]:
    """Return addresses as text, without those that only the daemon understands (webtransport's)."""
    texts = []
    for address in addresses:
        try:
            texts.append(str(Multiaddr(address)))
        except (ValueError, LookupError, TypeError) as error:  # TypeError: a truncated code
            log.debug("address ignored address=%s reason=%s", address.hex(), error)
    return texts


def _remove_leftovers() -> None:
    """Remove the socket folders that this user's killed processes (SIGKILL) left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        with suppress(FileNotFoundError):  # another worker that starts now removes them, too
            if folder.stat().st_uid == os.getuid() and not is_running(pid):
                shutil.rmtree(folder, ignore_errors=True)

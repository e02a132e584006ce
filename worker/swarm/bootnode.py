"""The bootnode: a peer at a stable address through which others find each other.

`hivewright bootnode` runs it. It exchanges greetings and stores membership records, but has no
groups. Its identity earns nothing, so it creates its key itself.
"""

import logging
import signal
import threading
import time
from types import FrameType

from worker.errors import SwarmError
from worker.runtime import systemd
from worker.runtime.files import write_whole
from worker.runtime.host import lock_folder, require_port
from worker.settings import Settings
from worker.swarm import identity
from worker.swarm.context import SwarmContext
from worker.swarm.network import Network

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    When it is ready, its addresses are in `<bootnode.state_dir>/multiaddr`, one per line, the most
    widely reachable first. Raises ResourceError if the port is taken, SwarmError if the daemon does
    not start in time.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _serve(settings, stopped)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _serve(settings: Settings, stopped: threading.Event) -> None:
    section = settings.bootnode
    require_port(section.host, section.port, "bootnode.port")
    section.state_dir.mkdir(parents=True, exist_ok=True)
    key_file, address_file = section.state_dir / "bootnode.pem", section.state_dir / "multiaddr"
    own = {name: getattr(section, name) for name in ("host", "port", "announce", "relay_others")}
    swarm = settings.swarm.model_copy(update={**own, "reachability": "public"})
    with lock_folder(section.state_dir, "bootnode.state_dir"):
        address_file.unlink(missing_ok=True)
        if not key_file.exists():
            identity.create(key_file)
        context = SwarmContext(swarm, key_file, section.state_dir, is_member=False)
        network = Network(context)
        try:
            network.start()
            _wait_until_up(context, swarm.startup_timeout_seconds, stopped)
            if not stopped.is_set():
                write_whole(
                    address_file,
                    "".join(f"{a}/p2p/{context.identity.peer_id}\n" for a in context.addresses),
                )
                log.info("bootnode ready file=%s", address_file)
                systemd.ready()
                stopped.wait()
        finally:
            network.close()


def _wait_until_up(
    context: SwarmContext,
    seconds: float,
    stopped: threading.Event,
) -> None:
    deadline = time.monotonic() + seconds
    while not context.is_up and not stopped.wait(0.05):
        if time.monotonic() > deadline:
            raise SwarmError(
                f"bootnode: not ready within {seconds:g} s (swarm.startup_timeout_seconds):"
                f" {context.last_error}"
            )

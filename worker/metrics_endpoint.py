"""The Prometheus endpoint of a service process, if `metrics.port` is set.

At each scrape, the figures of a worker or keeper are read from its status file, so the endpoint
needs no lock and no part of the program waits for it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker import __version__
from worker.chain import keeper_status, queue_status
from worker.errors import WorkerError
from worker.log import printable
from worker.runtime import host, running_release, tailscale_key
from worker.settings import Settings
from worker.telemetry import metrics, status

log = logging.getLogger(__name__)

_MAX_ERROR = 500
_KEY_SECONDS = 3600.0
"""Seconds between two queries for the expiry of the Tailscale key."""


@contextmanager
def serving(role: str, settings: Settings) -> Iterator[None]:
    """Serve the figures of this process while the block runs.

    Raises ResourceError if it can't listen on the address.
    """
    address, port = settings.metrics.host, settings.metrics.port
    if port is None:
        yield
        return
    host.require_port(address, port, "metrics.port")
    server, thread = start_http_server(port, address, registry(role, settings))
    log.info("metrics at http://%s:%d/metrics", *server.server_address[:2])
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def registry(role: str, settings: Settings) -> CollectorRegistry:
    """Return the collectors of a role: those of the process, and those of its own figures."""
    found = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=found)
    found.register(_Collector(role, settings))
    return found


class _Collector:
    """Version and role of this process, and the figures of its role."""

    def __init__(self, role: str, settings: Settings) -> None:
        self._role = role
        self._settings = settings
        self._ask_key_after = 0.0
        self._key_expires_at: float | None = None

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "hivewright_build_info", "1: role and version.", labels=("role", "version")
        )
        build.add_metric([self._role, __version__], 1)
        yield build
        yield from _of_release()
        found: list[Metric] = []
        is_readable = True
        for figures in (_of_rollback, _FIGURES.get(self._role, _nothing)):
            try:
                found += figures(self._settings)
            except WorkerError as error:
                log.warning("figures not read for the endpoint error=%s", error)
                is_readable = False
        yield GaugeMetricFamily(
            "hivewright_status_readable", "0: a file of figures can't be read.", value=is_readable
        )
        yield from found
        if (expires_at := self._key_expiry()) is not None:
            yield GaugeMetricFamily(
                "hivewright_tailscale_key_expires_time_seconds",
                "When the host's Tailscale key expires (Unix time).",
                value=expires_at,
            )

    def _key_expiry(self) -> float | None:
        if time.monotonic() >= self._ask_key_after:
            self._ask_key_after = time.monotonic() + _KEY_SECONDS
            self._key_expires_at = tailscale_key.expires_at()
        return self._key_expires_at

    def describe(self) -> tuple[Metric, ...]:
        """Return nothing, so that registering does not scrape: there may be no status yet."""
        return ()


def _of_release() -> Iterator[Metric]:
    found = running_release.current(Path.cwd())
    if found is None:
        return
    name, deployed_at = found
    info = GaugeMetricFamily("hivewright_release_info", "1: the release.", labels=("release",))
    info.add_metric([name], 1)
    yield info
    if deployed_at is not None:
        yield GaugeMetricFamily(
            "hivewright_deployed_time_seconds",
            "When a deploy or a rollback made this release the current one (Unix time).",
            value=deployed_at,
        )


def _nothing(_: Settings) -> Iterator[Metric]:
    yield from ()


def _of_rollback(_: Settings) -> Iterator[Metric]:
    found = running_release.last_rollback(Path.cwd())
    if found is None:
        return
    metric = GaugeMetricFamily(
        "hivewright_rolled_back_time_seconds",
        "When the host last went back from a release, and why (Unix time).",
        labels=("release", "reason"),
    )
    metric.add_metric([printable(found.release), printable(found.reason)], found.at)
    yield metric


def _of_worker(settings: Settings) -> Iterator[Metric]:
    node = status.read(settings.node.state_dir)
    if node is not None:
        yield from metrics.NodeCollector(node).collect()


def _of_keeper(settings: Settings) -> Iterator[Metric]:
    now = keeper_status.read_status(settings.keeper.state_dir)
    if now is None:
        return
    state = GaugeMetricFamily(
        "hivewright_keeper_state", "1: the state that the keeper is in.", labels=("state",)
    )
    for name in get_args(keeper_status.State):
        state.add_metric([name], name == now.state)
    yield state
    figures: Mapping[str, tuple[str, float | None]] = {
        "keeper_round": ("The open round.", now.round),
        "keeper_reporters": ("Peers that reported in the open round.", now.reporters),
        "keeper_expected": ("Reports that the keeper waits for.", now.expected),
        "keeper_round_began_time_seconds": ("When the round began (Unix time).", now.began_at),
        "keeper_round_limit_seconds": ("keeper.round_seconds.", settings.keeper.round_seconds),
    }
    for name, (what, value) in figures.items():
        if value is not None:
            yield GaugeMetricFamily(f"hivewright_{name}", what, value=value)


def _of_account(settings: Settings) -> Iterator[Metric]:
    now = queue_status.read_status(settings.account.state_dir)
    if now is None:
        return
    state = now.queues
    pending = GaugeMetricFamily(
        "hivewright_queue_transactions",
        "Pending transactions: waiting for a node to accept them, or sent and not mined.",
        labels=("state",),
    )
    pending.add_metric(["waiting"], state.waiting)
    pending.add_metric(["sent"], state.sent)
    yield pending
    yield CounterMetricFamily(
        "hivewright_queue_failed", "Calls refused or given up since the start.", value=state.failed
    )
    yield GaugeMetricFamily(
        "hivewright_queue_time_seconds", "When the queues were counted.", value=now.updated_at
    )
    if state.oldest_at is not None:
        yield GaugeMetricFamily(
            "hivewright_queue_oldest_time_seconds",
            "When the oldest pending transaction arrived (Unix time).",
            value=state.oldest_at,
        )
    if state.last_error is not None and state.last_error_at is not None:
        error = GaugeMetricFamily(
            "hivewright_queue_error_time_seconds",
            "When the last error of a transaction was, and which.",
            labels=("error",),
        )
        error.add_metric([printable(state.last_error)[:_MAX_ERROR]], state.last_error_at)
        yield error


_FIGURES: Mapping[str, Callable[[Settings], Iterator[Metric]]] = {
    "worker": _of_worker,
    "keeper": _of_keeper,
    "account": _of_account,
}

"""The fleet part of the dashboard: the metrics of its nodes, if the owner shows them.

The endpoints are the targets of Prometheus, in a file that a deploy or the demo writes. Every row
has the time of its figures; a process that does not answer keeps its last figures, with the reason.
Figures of each round are stored as curves, and changes as events.
"""

import json
import logging
import math
import sqlite3
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from worker.dashboard.store import Store
from worker.log import printable
from worker.runtime.outage import Outage

log = logging.getLogger(__name__)

MAX_TARGETS = 1000
ANSWER_SECONDS = 3.0
_MAX_ANSWER_BYTES = 1_000_000
_PIECE_BYTES = 1 << 16
_MAX_TEXT = 120
_MAX_REASON = 500
_NUM_PARALLEL = 32
_FIGURES = {
    "round": "hivewright_round",
    "reward": "hivewright_reward_mean",
    "peers": "hivewright_peers_heard",
    "external_share": "hivewright_external_share",
    "no_signal": "hivewright_frac_reward_zero_std",
    "entropy": "hivewright_entropy",
    "gpu_fault_level": "hivewright_gpu_fault_level",
    "gpu_temperature": "hivewright_gpu_temperature_celsius",
    "as_of": "hivewright_status_time_seconds",
    "finished_at": "hivewright_round_finished_time_seconds",
    "deployed_at": "hivewright_deployed_time_seconds",
}
"""Figures of a row, by the name of their metric."""
_NAMES = {metric: name for name, metric in _FIGURES.items()} | {
    "hivewright_keeper_round": "round",
    "hivewright_queue_time_seconds": "as_of",
}
_QUEUE = {
    "hivewright_queue_failed_total": "failed",
    "hivewright_queue_oldest_time_seconds": "oldest_at",
}
"""Figures of the account service's queue, without the transactions by state and the last error."""


@dataclass(slots=True)
class _Process:
    """The last answer of one endpoint. `as_of`: Unix time of its figures; None: none yet."""

    labels: Mapping[str, str]
    figures: dict[str, float | None] = field(default_factory=dict)
    state: str | None = None
    name: str | None = None
    version: str | None = None
    release: str | None = None
    peer_id: str | None = None
    warnings: tuple[str, ...] = ()
    families: dict[str, float] = field(default_factory=dict)
    brier: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, float] = field(default_factory=dict)
    rejected_now: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)
    quarantined: dict[str, tuple[float, str]] = field(default_factory=dict)
    rollback: tuple[float, str, str] | None = None
    """The host's last rollback: when, from which release, and why."""
    queue: dict[str, Any] = field(default_factory=dict)
    """Of the account service: pending transactions, see `_QUEUE`."""
    error: str | None = None

    @property
    def place(self) -> str:
        parts = (self.labels.get("host"), self.labels.get("service"), self.labels.get("slot"))
        return _short(" ".join(part for part in parts if part))


_NOTHING = _Process({})


class FleetView:
    """The processes of the targets in `file`: `look` reads their metrics for `content`."""

    def __init__(self, file: Path, store: Store | None = None) -> None:
        """`store`: None: keep no history."""
        self._file = file
        self._store = store
        self._processes: dict[str, _Process] = {}
        self._outage = Outage(log)
        self._error: str | None = None

    def look(self) -> None:
        """Ask all endpoints at the same time."""
        try:
            targets = dict(_targets(json.loads(self._file.read_text())))
        except FileNotFoundError:
            self._error = "no targets yet: metrics_port is not set, or nothing was deployed"
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._error = "the targets can't be read"
            self._outage.begin("targets can't be read file=%s error=%s", self._file, error)
            return
        self._outage.end("targets can be read again file=%s", self._file)
        self._error = None
        last = {
            address: replace(self._processes.get(address, _NOTHING), labels=labels)
            for address, labels in targets.items()
        }
        with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
            asked = list(pool.map(_ask, last, last.values()))
        self._processes = dict(zip(last, asked, strict=True))
        before = {address: _seen(process) for address, process in last.items()}
        if self._store is not None:
            try:
                self._keep(self._store, before)
            except sqlite3.Error as error:
                log.warning("figures not stored file=%s error=%s", self._store.file, error)

    def _keep(self, store: Store, before: Mapping[str, Mapping[str, Any]]) -> None:
        """Store the figures of finished rounds, and changes of the processes."""
        with store.writing():
            for address, process in self._processes.items():
                finished_at = process.figures.get("finished_at")
                round = process.figures.get("round")
                key = f"figures/{address}"  # each round once, also after a restart
                if finished_at is not None and round is not None and finished_at != store.mark(key):
                    store.add_figures(int(round), _curve_figures(process))
                    store.set_mark(key, finished_at)
                _keep_rollback(store, process)
                if before[address]:
                    for text in _changes(before[address], _seen(process)):
                        store.add_event("fleet", process.place, text)

    def content(self) -> dict[str, Any]:
        """Return the answer of /api/fleet."""
        processes = list(self._processes.values())
        return {
            "error": self._error,
            "processes": [_row(process) for process in processes],
            "families": _means(process.families for process in processes),
            "brier": _means(process.brier for process in processes),
            "rejected": _sums(process.rejected for process in processes),
        }


def _keep_rollback(store: Store, process: _Process) -> None:
    """Store the host's rollback, which all of its processes report, with the reason."""
    if process.rollback is None:
        return
    at, release, reason = process.rollback
    host = _short(process.labels.get("host", ""))
    key = f"rollback/{host}"
    if math.isfinite(at) and at != store.mark(key):
        text = f"went back from release {release}: {reason}"
        store.add_event("fleet", host, text, min(at, time.time()))
        store.set_mark(key, at)


def _targets(groups: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Mapping[str, str]]]:
    found = []
    for group in groups:
        labels = {str(name): str(value) for name, value in group["labels"].items()}
        found += [(str(address), labels) for address in group["targets"]]
    return found[:MAX_TARGETS]


def _ask(address: str, last: _Process) -> _Process:
    """Return the answer of an endpoint; without one, the last answer with the error."""
    try:
        url = f"http://{address}/metrics"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            text = _read(answer)
        return _taken(last.labels, text)
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return replace(last, error=_short(str(getattr(reason, "strerror", None) or reason)))


def _read(answer: HTTPResponse) -> str:
    """Return the answer. Raises ValueError if it is too long, TimeoutError if it takes too long."""
    deadline = time.monotonic() + ANSWER_SECONDS
    content = bytearray()
    while piece := answer.read1(_PIECE_BYTES):
        content += piece
        if len(content) > _MAX_ANSWER_BYTES:
            raise ValueError(f"the answer has more than {_MAX_ANSWER_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer took more than {ANSWER_SECONDS:g} s")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError("the answer is not text in UTF-8") from None


def _seen(process: _Process) -> Mapping[str, Any]:
    """Return the values in which changes are detected; empty before the first answer or error."""
    if not process.figures and process.error is None:
        return {}
    return {
        "state": process.state,
        "error": process.error,
        "warnings": process.warnings,
        "release": process.release,
        "quarantined": process.quarantined,
    }


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    """Yield the differences between two looks, in words."""
    if now["error"] != before["error"]:
        yield "answers again" if now["error"] is None else f"does not answer: {now['error']}"
    if now["state"] != before["state"] and before["state"] is not None:
        yield f"state {before['state']}, now {now['state']}"
    if now["release"] != before["release"] and before["release"] is not None:
        yield f"release {before['release']}, now {now['release']}"
    for warning in now["warnings"]:
        if warning not in before["warnings"]:
            yield f"warning: {warning}"
    for warning in before["warnings"]:
        if warning not in now["warnings"]:
            yield f"warning ended: {warning}"
    for peer_id, (at, reason) in now["quarantined"].items():
        if before["quarantined"].get(peer_id) != (at, reason):
            yield f"peer quarantined: {peer_id}: {reason}"


def _curve_figures(process: _Process) -> list[tuple[str, float]]:
    figures = [(f"family/{name}", value) for name, value in process.families.items()]
    share = process.figures.get("external_share")
    if share is not None:
        figures.append(("external/share of peers' groups", share))
    figures += [(f"brier/{name}", value) for name, value in process.brier.items()]
    figures += [(f"rejected/{name}", value) for name, value in process.rejected_now.items()]
    return [(name, value) for name, value in figures if math.isfinite(value)]


def _taken(labels_of_target: Mapping[str, str], text: str) -> _Process:
    """Parse the metrics of an endpoint. Raises ValueError if they are not Prometheus's format."""
    figures: dict[str, float | None] = {"as_of": time.time()}
    fresh = _Process(labels_of_target, figures)
    warnings: list[str] = []
    families: defaultdict[str, list[float]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels, value = sample.name, sample.labels, sample.value
            if name in _NAMES:
                figures[_NAMES[name]] = value if math.isfinite(value) else None
                fresh.name = _short(labels.get("node", "")) or fresh.name
            elif name in ("hivewright_state", "hivewright_keeper_state") and value == 1:
                fresh.state = _short(labels.get("state", ""))
            elif name == "hivewright_warning" and value == 1:
                warnings.append(_short(f"{labels.get('check')} ({labels.get('severity')})"))
            elif name == "hivewright_family_reward_mean":
                families[_short(labels.get("family", ""))].append(value)
            else:
                _take_labelled(fresh, name, labels, value)
    fresh.families = {name: sum(values) / len(values) for name, values in families.items()}
    fresh.warnings = tuple(sorted(warnings))
    return fresh


def _take_labelled(process: _Process, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == "hivewright_build_info":
        process.version = _short(labels.get("version", ""))
    elif name == "hivewright_release_info":
        process.release = _short(labels.get("release", ""))
    elif name == "hivewright_peer_info":
        process.peer_id = _short(labels.get("peer_id", ""))
    elif name == "hivewright_ledger" and value:
        process.ledger[_short(labels.get("state", ""))] = value
    elif name == "hivewright_market_brier":
        process.brier[_short(labels.get("family", ""))] = value
    elif name == "hivewright_groups_rejected_total":
        process.rejected[_short(labels.get("reason", ""))] = value
    elif name == "hivewright_round_groups_rejected":
        process.rejected_now[_short(labels.get("reason", ""))] = value
    elif name == "hivewright_peer_quarantined_time_seconds":
        reason = _short(labels.get("reason", ""))
        process.quarantined[_short(labels.get("peer_id", ""))] = value, reason
    elif name == "hivewright_rolled_back_time_seconds":
        reason = printable(labels.get("reason", ""))[:_MAX_REASON]
        process.rollback = value, _short(labels.get("release", "")), reason
    elif name.startswith("hivewright_queue_") and math.isfinite(value):
        _take_queue(process.queue, name, labels, value)


def _take_queue(queue: dict[str, Any], name: str, labels: Mapping[str, str], value: float) -> None:
    if name == "hivewright_queue_transactions":
        queue[_short(labels.get("state", ""))] = value
    elif name in _QUEUE:
        queue[_QUEUE[name]] = value
    elif name == "hivewright_queue_error_time_seconds":
        queue["error"] = printable(labels.get("error", ""))[:_MAX_REASON]
        queue["error_at"] = value


def _row(process: _Process) -> dict[str, Any]:
    figures = {name: process.figures.get(name) for name in _FIGURES}
    return {
        "host": _short(process.labels.get("host", "")),
        "service": _short(process.labels.get("service", "")),
        "slot": process.labels.get("slot"),
        "name": process.name,
        "version": process.version,
        "release": process.release,
        "peer_id": process.peer_id,
        "ledger": process.ledger,
        "rollback": _row_rollback(process),
        "queue": process.queue,
        "state": process.state,
        "warnings": process.warnings,
        "error": process.error,
        **figures,
    }


def _row_rollback(process: _Process) -> dict[str, Any] | None:
    """Return the last rollback; None: the host never went back, or was deployed to since."""
    if process.rollback is None:
        return None
    at, release, reason = process.rollback
    deployed_at = process.figures.get("deployed_at")
    if not math.isfinite(at) or (deployed_at is not None and deployed_at > at):
        return None
    return {"at": at, "release": release, "reason": reason}


def _means(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for table in tables:
        for name, value in table.items():
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def _sums(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for table in tables:
        for name, value in table.items():
            sums[name] += value
    return dict(sorted(sums.items()))


def _short(text: str) -> str:
    return printable(text)[:_MAX_TEXT]

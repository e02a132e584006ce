"""The fleet part of the dashboard: what the metrics of its nodes say, if the owner shows it.

The endpoints are those of Prometheus's targets, which a deploy or the demo writes. Every row says
as of when it is; a process that does not answer keeps its last figures, with the reason.
"""

import json
import logging
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from worker.log import printable
from worker.runtime.outage import Outage

log = logging.getLogger(__name__)

MAX_TARGETS = 1000
ANSWER_SECONDS = 3.0
_MAX_ANSWER_BYTES = 1_000_000
_MAX_TEXT = 120
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
}
"""Figures of a row, by the name of their metric."""


@dataclass(slots=True)
class _Process:
    """The last answer of one endpoint. `as_of`: Unix time of its figures; None: none yet."""

    labels: Mapping[str, str]
    figures: dict[str, float | None] = field(default_factory=dict)
    state: str | None = None
    name: str | None = None
    version: str | None = None
    warnings: tuple[str, ...] = ()
    families: dict[str, float] = field(default_factory=dict)
    brier: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class FleetView:
    """The processes of the targets in `file`: `look` asks them, `content` returns the answer."""

    def __init__(self, file: Path) -> None:
        self._file = file
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
        known = self._processes
        self._processes = {
            address: known.get(address) or _Process(labels) for address, labels in targets.items()
        }
        with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
            list(pool.map(_ask, self._processes, self._processes.values()))

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


def _targets(groups: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Mapping[str, str]]]:
    found = []
    for group in groups:
        labels = {str(name): str(value) for name, value in group["labels"].items()}
        found += [(str(address), labels) for address in group["targets"]]
    return found[:MAX_TARGETS]


def _ask(address: str, process: _Process) -> None:
    try:
        url = f"http://{address}/metrics"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            text = answer.read(_MAX_ANSWER_BYTES).decode()
        _take(process, text)
        process.error = None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        process.error = _short(str(getattr(reason, "strerror", None) or reason))


def _take(process: _Process, text: str) -> None:
    wanted = {metric: name for name, metric in _FIGURES.items()}
    figures: dict[str, float | None] = {"as_of": time.time()}
    warnings, families, brier, rejected = [], {}, {}, {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels, value = sample.name, sample.labels, sample.value
            if name in wanted:
                figures[wanted[name]] = value
                process.name = _short(labels.get("node", "")) or process.name
            elif name == "hivewright_build_info":
                process.version = _short(labels.get("version", ""))
            elif name in ("hivewright_state", "hivewright_keeper_state") and value == 1:
                process.state = _short(labels.get("state", ""))
            elif name == "hivewright_keeper_round":
                figures["round"] = value
            elif name == "hivewright_warning" and value == 1:
                warnings.append(_short(f"{labels.get('check')} ({labels.get('severity')})"))
            elif name == "hivewright_family_reward_mean":
                families[_short(labels.get("family", ""))] = value
            elif name == "hivewright_market_brier":
                brier[_short(labels.get("family", ""))] = value
            elif name == "hivewright_groups_rejected_total":
                rejected[_short(labels.get("reason", ""))] = value
    process.figures = figures
    process.warnings = tuple(sorted(warnings))
    process.families, process.brier, process.rejected = families, brier, rejected


def _row(process: _Process) -> dict[str, Any]:
    figures = {name: process.figures.get(name) for name in _FIGURES}
    return {
        "host": _short(process.labels.get("host", "")),
        "service": _short(process.labels.get("service", "")),
        "slot": process.labels.get("slot"),
        "name": process.name,
        "version": process.version,
        "state": process.state,
        "warnings": process.warnings,
        "error": process.error,
        **figures,
    }


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

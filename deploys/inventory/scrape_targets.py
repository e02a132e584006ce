"""The endpoints for Prometheus of a fleet, as targets of its file-based service discovery.

The deploy writes them on each coordinator, with the labels host, service and slot.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from deploys.inventory.addresses import is_reachable
from deploys.inventory.host_plan import HostPlan, Target
from worker.settings import Settings

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def targets_of(
    plan: HostPlan,
    data: Mapping[str, Any],
) -> tuple[Target, ...]:
    """Return the endpoints of a host; `data` is the host's in the inventory."""
    return tuple(_targets(plan, str(data.get("ssh_hostname") or plan.name)))


def _targets(
    plan: HostPlan,
    name: str,
) -> Iterator[Target]:
    for role, settings in plan.services.items():
        if settings.metrics.port:
            yield Target(plan.name, role, settings.metrics.port, _address(settings, name))
    for slot in plan.slots:
        port = slot.settings.metrics.port
        if port:
            yield Target(plan.name, "worker", port, _address(slot.settings, name), slot.number)


def _address(settings: Settings, name: str) -> str | None:
    host = settings.metrics.host
    if host in _LOOPBACK:
        return None
    reachable = host if is_reachable(host) else name
    return _joined(reachable, settings.metrics.port)


def _joined(host: str, port: int | None) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def render(
    targets: Iterable[Target],
    host: str,
) -> str:
    """Return the file for a Prometheus on `host`, which also reaches that host's own loopback."""
    groups = []
    for target in targets:
        address = target.address
        if address is None and target.host == host:
            address = _joined("127.0.0.1", target.port)
        if address is None:
            continue
        labels = {"host": target.host, "service": target.service}
        if target.slot is not None:
            labels["slot"] = str(target.slot)
        groups.append({"targets": [address], "labels": labels})
    return json.dumps(groups, indent=1) + "\n"


def merged(
    known: Collection[Target],
    newer: Mapping[str, Collection[Target]],
) -> list[Target]:
    """Return the targets in the order of hosts; those in `newer`, by host, replace known ones."""
    found = [target for target in known if target.host not in newer]
    for targets in newer.values():
        found += targets
    return sorted(found, key=lambda t: (t.host, t.service, t.slot or 0))

"""Settings of slots and services, derived from the flat keys of a host's data."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploys.inventory.addresses import bootnode_announce, is_reachable
from deploys.inventory.host_plan import COORDINATORS, HostEntry, nth_name
from deploys.inventory.schema import Deployment, pick
from deploys.inventory.secret_files import ACCOUNT_SECRETS, SLOT_SECRETS
from deploys.inventory.slots import SlotOptions
from deploys.paths import ANVIL, MODELS, credential, market_record, state_dir
from deploys.services import COORDINATOR_ROLES, DERIVED, WORKER_SECTIONS
from worker import settings
from worker.settings import Settings

# A worker reads the chain through the account service, over the network, and rounds last minutes.
WORKER_POLL_SECONDS = 3.0
# Keys of a slot that are not settings.
SLOT_KEYS = ("identity", *SlotOptions.model_fields)


def section_of(key: str) -> str | None:
    """Return the section of the settings that a key belongs to; None: it is not a setting."""
    section, _, name = key.partition("_")
    return section if name and section in settings.SECTIONS else None


def own_settings(
    entry: HostEntry,
    sections: Collection[str],
) -> dict[str, Any]:
    """Return the keys of the host's data that belong to these sections of the settings."""
    return {
        key: value
        for key, value in entry.data.items()
        if key not in DERIVED and section_of(key) in sections
    }


def hint(
    key: str,
    known: Iterable[str],
) -> str:
    """Return advice for an unknown key: the most similar known one, or where all are listed."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]}?" if close else "docs/configuration.md lists all keys"


def slot_settings(
    entry: HostEntry,
    number: int,
    own: Mapping[str, Any],
    account_url: str | None,
) -> dict[str, Any]:
    """Return the flat settings of a slot; `own`: the keys in which it differs from its host."""
    flat = own_settings(entry, WORKER_SECTIONS)
    for key in ("swarm_port", "metrics_port"):
        port = _port(entry, key, number, own)
        if port is not None:
            flat[key] = port
    flat |= pick(own, own.keys() - SLOT_KEYS)
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", entry.name).strip("-._")[:50]
    flat.setdefault("node_name", nth_name(host or "worker", number))
    flat.setdefault("chain_poll_seconds", WORKER_POLL_SECONDS)
    if account_url:
        flat.setdefault("chain_account_url", account_url)
    if COORDINATORS in entry.groups:
        flat = _own_judge_url(entry) | flat
    if "chain_account_url" in flat:
        flat["chain_enrolment_token_file"] = credential(f"enrol@{number}")
    for key, name in SLOT_SECRETS.items():
        if isinstance(flat.get(key), str):
            flat[key] = credential(f"worker@{number}", name)
    if isinstance(flat.get("model_token_file"), str):
        # Only `hivewright fetch` gets the token, never the worker.
        del flat["model_token_file"]
    flat["node_state_dir"] = str(state_dir(number))
    flat["market_record_file"] = str(market_record(number))
    if is_downloaded(flat.get("model_name")):
        flat["model_shared_dir"] = str(MODELS)
    return flat


def _port(
    entry: HostEntry,
    key: str,
    number: int,
    own: Mapping[str, Any],
) -> int | None:
    """Return the slot's own port, or the host's plus its number; None: neither is set."""
    if key in own:
        port = own[key]
        return port if isinstance(port, int) else None
    port = entry.data.get(key)
    if not port or not isinstance(port, int) or isinstance(port, bool):
        return None
    return port + number


def is_downloaded(model_name: object) -> bool:
    """Return whether a model of this name is downloaded from Hugging Face."""
    if not isinstance(model_name, str) or model_name == settings.Model().name:
        return False
    return not model_name.startswith(("/", "./", "../", "~"))


def service_settings(
    entry: HostEntry,
    deployment: Deployment,
) -> dict[str, Settings]:
    """Return the settings of the coordinator's roles, from data without mistakes."""
    if COORDINATORS not in entry.groups:
        return {}
    accounts_url, dashboard_url = _page_urls(entry, deployment)
    extra: dict[str, dict[str, Any]] = {
        "chain": {"anvil_binary": str(entry.data.get("anvil_binary") or ANVIL)},
        "bootnode": dict(bootnode_announce(entry.data)),
        "judge": {"judge_host": _judge_host(entry)},
        "dashboard": {
            **_own_judge_url(entry),
            **_link(entry, "dashboard_accounts_url", accounts_url),
        },
        "account": {
            **_proxy_settings(entry, deployment),
            **_link(entry, "account_dashboard_url", dashboard_url),
            **_judge_url(entry),
            **{key: credential("account", ACCOUNT_SECRETS[key]) for key in account_secrets(entry)},
        },
    }
    services = {}
    for role in roles_of(entry.data):
        service = COORDINATOR_ROLES[role]
        flat = own_settings(entry, service.sections)
        # The account service is for nodes without a route to the chain, which is on this host.
        flat.pop("chain_account_url", None)
        flat |= {key: str(path) for key, path in service.files.items()}
        if metrics_port := flat.get("metrics_port"):
            # The ports from metrics_port up are those of slots.
            flat["metrics_port"] = metrics_port - 1 - list(COORDINATOR_ROLES).index(role)
        services[role] = settings.from_flat(flat | extra.get(role, {}), entry.name)
    return services


def roles_of(data: Mapping[str, Any]) -> list[str]:
    """Return the roles of a coordinator with this data: without a market it has no judge."""
    return [role for role in COORDINATOR_ROLES if role != "judge" or _has_market(data)]


def wrong_metrics_port(entry: HostEntry) -> Iterator[str]:
    """Yield the mistake in a coordinator's metrics_port: its services have the ports below it."""
    port, num_services = entry.data.get("metrics_port"), len(COORDINATOR_ROLES)
    if COORDINATORS in entry.groups and isinstance(port, int) and 0 < port <= num_services:
        yield (
            f"metrics_port: got {port}; expected more than {num_services}, since each of the"
            f" {num_services} services of a coordinator has one of the ports below it"
        )


def _page_urls(
    entry: HostEntry,
    deployment: Deployment,
) -> tuple[str | None, str | None]:
    """Return the addresses of the sign-in page and the dashboard for browsers on other machines.

    None: the page has none, or one that no inventory knows, such as a name in a tailnet.
    """
    if "account_passphrase_file" not in entry.data:
        return None, None  # without it there are no pages of accounts
    accounts_url, dashboard_url = _own_url(entry, "account"), _own_url(entry, "dashboard")
    public_url = entry.data.get("account_public_url")
    if not isinstance(public_url, str):
        return accounts_url, dashboard_url
    port = entry.data.get("dashboard_port", settings.Dashboard().port)
    for shown, served in deployment.tailscale_serve.items():
        if deployment.tailscale and served == port:
            dashboard_url = f"https://{urlsplit(public_url).hostname}:{shown}"
    return public_url, dashboard_url


def _own_url(entry: HostEntry, section: str) -> str | None:
    """Return the URL at which the service itself listens; None: only its host can reach it."""
    host = entry.data.get(f"{section}_host")
    if host is None or not is_reachable(host):
        return None
    port = entry.data.get(
        f"{section}_port", settings.SECTIONS[section].model_fields["port"].default
    )
    return _http_url(host, port)


def _http_url(host: str, port: int) -> str:
    place = f"[{host}]" if ":" in host else host
    return f"http://{place}:{port}"


def _link(
    entry: HostEntry,
    key: str,
    url: str | None,
) -> dict[str, str]:
    """Return a setting with a URL, unless that is None or the inventory sets it."""
    return {} if url is None or key in entry.data else {key: url}


def _judge_host(entry: HostEntry) -> str:
    """Return the address that the judge listens on: by default the account service's."""
    default = entry.data.get("account_host", settings.Judge().host)
    return str(entry.data.get("judge_host", default))


def _has_market(data: Mapping[str, Any]) -> bool:
    return data.get("market_enabled") is not False


def _judge_url(entry: HostEntry) -> dict[str, str]:
    """Return the judge's URL, which nodes on any host learn from the account service.

    Returns no setting if there is no judge, or other hosts can't reach its address.
    """
    host = _judge_host(entry)
    return _url_at(entry, host) if is_reachable(host) else {}


def _own_judge_url(entry: HostEntry) -> dict[str, str]:
    """Return the judge's URL for processes on its own host, where it always has this address."""
    return _url_at(entry, "127.0.0.1")


def _url_at(entry: HostEntry, host: str) -> dict[str, str]:
    """Return the judge's URL; empty if there is no judge, or the inventory names its URL."""
    if not _has_market(entry.data):
        return {}
    port = entry.data.get("judge_port", settings.Judge().port)
    return _link(entry, "market_judge_url", _http_url(host, port))


def account_secrets(entry: HostEntry) -> dict[str, Path]:
    """Return the local files with secrets of the account service, by key."""
    if COORDINATORS not in entry.groups:
        return {}
    found = {key: entry.data.get(key) for key in ACCOUNT_SECRETS}
    return {key: Path(file) for key, file in found.items() if isinstance(file, str)}


def _proxy_settings(
    entry: HostEntry,
    deployment: Deployment,
) -> dict[str, Any]:
    """Return the account service's settings behind `tailscale serve`, if it serves its port."""
    port = entry.data.get("account_port", settings.Account.model_fields["port"].default)
    served = {*deployment.tailscale_serve.values(), *deployment.tailscale_serve_http.values()}
    if not deployment.tailscale or port not in served:
        return {}
    return {
        key: entry.data.get(key, True)
        for key in ("account_behind_proxy", "account_tailscale_login")
    }

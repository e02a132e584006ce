"""Parse the output of Tailscale's programs, and make their arguments, without pyinfra.

The forms are those of `tailscale status --json`, `tailscale debug prefs` and `tailscale serve
status --json`.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deploys.inventory import secret_files
from deploys.inventory.schema import Deployment
from worker.errors import SettingsError
from worker.runtime.files import read_secret

RUNNING, NEEDS_APPROVAL = "Running", "NeedsMachineAuth"
# States with a login: stopped by `tailscale down`; and starting, or without an answer of the
# control server.
STOPPED, NO_STATE = "Stopped", "NoState"
AUTH_KEY, CLIENT_SECRET = "tskey-auth-", "tskey-client-"
# By default a key that an OAuth client makes is for an ephemeral node that waits for approval.
CLIENT_OPTIONS = "?ephemeral=false&preauthorized=true"
EXPECTED_KEY = (
    f"a file with an auth key ({AUTH_KEY}...) or the secret of an OAuth client ({CLIENT_SECRET}...)"
)
WARN_BEFORE = timedelta(days=14)
# Tailscale's own control server, by all its names; and where its users administer their tailnets.
OWN_SERVER = "https://controlplane.tailscale.com"
OWN_SERVERS = (OWN_SERVER, "https://login.tailscale.com")
ADMIN_URL = "https://login.tailscale.com/admin/machines"
SSH_CAPABILITY = "https://tailscale.com/cap/ssh"
EVERYWHERE = ("0.0.0.0/0", "::/0")
# Scheme and port at which a host serves something in the tailnet, such as ("https", 443).
Endpoint = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Tailnet:
    """A host's state in a tailnet.

    `state`: BackendState of the daemon; None: it does not answer. `expires`: expiry of the node's
    key; None: never. `health`: the daemon's warnings. `serves`: what is served at `/` of an
    endpoint. `ours`: what an earlier deploy served there. `ports`: the use of each port: `https`,
    `http`, or the target of a TCP forward.
    """

    is_installed: bool = False
    state: str | None = None
    login_url: str | None = None
    addresses: tuple[str, ...] = ()
    expires: datetime | None = None
    tags: frozenset[str] = frozenset()
    has_ssh: bool = False
    has_https: bool = False
    health: tuple[str, ...] = ()
    preferences: Mapping[str, Any] = field(default_factory=dict)
    serves: Mapping[Endpoint, str] = field(default_factory=dict)
    ours: Mapping[Endpoint, str] = field(default_factory=dict)
    ports: Mapping[int, str] = field(default_factory=dict)

    @property
    def is_connected(self) -> bool:
        return self.state == RUNNING

    @property
    def runs_ssh(self) -> bool:
        """True if Tailscale's ssh server answers at port 22 of the host's tailnet addresses."""
        return bool(self.preferences.get("RunSSH"))

    @property
    def server(self) -> str:
        """The URL of the control server that the host is, or was last, logged in at."""
        return str(self.preferences.get("ControlURL") or OWN_SERVER).rstrip("/")

    @property
    def admin_url(self) -> str:
        """The URL where a machine is approved, as `tailscale up` prints it."""
        return ADMIN_URL if self.server in OWN_SERVERS else f"{self.server}/admin"

    def worries(
        self,
        now: datetime,
        deployment: Deployment,
    ) -> Iterator[str]:
        """Yield warnings about a connected host."""
        if self.expires is not None and self.expires - now < WARN_BEFORE:
            days = (self.expires - now).days
            when = (
                "has expired"
                if self.expires <= now
                else f"expires in {days} days ({self.expires:%Y-%m-%d})"
            )
            command = relogin_command(self, sorted(self.tags))
            yield (
                f"its Tailscale key {when}; {command} renews it, or disable key expiry at"
                f" {self.admin_url}"
            )
        server = (deployment.tailscale_login_server or OWN_SERVER).rstrip("/")
        if self.server != server and not {self.server, server} <= set(OWN_SERVERS):
            yield (
                f"logged in at {self.server}, not at {server}; it is left alone: `tailscale logout`"
                " there to move it"
            )
        wanted = frozenset(deployment.tailscale_tags)
        # Without tags in the inventory, any tags given by a key or an admin are accepted.
        if self.tags != wanted and (wanted or self.preferences.get("AdvertiseTags")):
            command = relogin_command(self, sorted(wanted))
            yield (
                f"its tags in the tailnet are {_listed(self.tags)}, tailscale_tags says"
                f" {_listed(wanted)}; tags change with a new login: {command}, or an admin does it"
                f" at {self.admin_url}"
            )
        name = self.preferences.get("Hostname")
        if name and not deployment.tailscale_hostname:
            yield (
                f"it has the name {name} in the tailnet, and the inventory no tailscale_hostname;"
                " put it there, or give it the machine's own name: `tailscale set --hostname=`"
                " there"
            )


def _listed(tags: Iterable[str]) -> str:
    return ", ".join(sorted(tags)) or "none"


def parse(text: str) -> Tailnet:
    """Parse the output of the fact: one JSON object with status, prefs, serve and ours.

    status, prefs and serve are null if the program failed. ours: pairs of an endpoint and the
    target that a deploy served there.
    """
    output = json.loads(text)
    status, serve = output["status"] or {}, output["serve"] or {}
    me = status.get("Self") or {}
    expiry = me.get("KeyExpiry")
    addresses = status.get("TailscaleIPs") or me.get("TailscaleIPs")
    capabilities = me.get("CapMap") or me.get("Capabilities")
    return Tailnet(
        is_installed=True,
        state=status.get("BackendState"),
        login_url=status.get("AuthURL") or None,
        addresses=tuple(addresses or ()),
        expires=datetime.fromisoformat(expiry).astimezone(UTC) if expiry else None,
        tags=frozenset(me.get("Tags") or ()),
        has_ssh=SSH_CAPABILITY in (capabilities or ()),
        has_https=bool(status.get("CertDomains")),
        health=tuple(status.get("Health") or ()),
        preferences=output["prefs"] or {},
        serves=dict(_served(serve)),
        ours=_read_served(output.get("ours") or ""),
        ports=_ports(serve),
    )


def _read_served(text: str) -> dict[Endpoint, str]:
    """Parse pairs of an endpoint, in the form of `written`, and its target."""
    words = text.split()
    served = {}
    for at, target in zip(words[::2], words[1::2], strict=True):
        scheme, _, port = at.rpartition(":")
        served[scheme or "https", int(port)] = target
    return served


def _ports(serve: Mapping[str, Any]) -> dict[int, str]:
    return {int(port): _use(handler) for port, handler in (serve.get("TCP") or {}).items()}


def _served(serve: Mapping[str, Any]) -> Iterator[tuple[Endpoint, str]]:
    for name, web in (serve.get("Web") or {}).items():
        port = int(name.rpartition(":")[2])
        root = (web.get("Handlers") or {}).get("/")
        if root is not None:
            scheme = _use((serve.get("TCP") or {}).get(str(port)) or {"HTTPS": True})
            yield (scheme, port), str(root.get("Proxy") or root.get("Path") or "a text")


def _use(handler: Mapping[str, Any]) -> str:
    if handler.get("HTTPS"):
        return "https"
    return "http" if handler.get("HTTP") else str(handler.get("TCPForward"))


def written(at: Endpoint) -> str:
    """Return an endpoint as it is kept on the host: 443, http:80."""
    scheme, port = at
    return str(port) if scheme == "https" else f"{scheme}:{port}"


def mistakes(deployment: Deployment) -> Iterator[str]:
    """Yield the mistakes in the inventory's Tailscale keys that the operator's side can detect."""
    if not deployment.tailscale:
        return
    for port in sorted(deployment.tailscale_serve.keys() & deployment.tailscale_serve_http.keys()):
        yield (
            f"tailscale_serve_http/{port}: is in tailscale_serve too; expected another port for"
            " each"
        )
    try:
        key = auth_key(deployment)
    except SettingsError as error:
        yield f"tailscale_auth_key_file: {error}"
        return
    if key is not None and key.startswith(CLIENT_SECRET) and not deployment.tailscale_tags:
        yield (
            "tailscale_tags: none; keys of an OAuth client need one that the client may give, such"
            " as tag:hivewright"
        )


def warnings(deployment: Deployment) -> Iterator[str]:
    """Yield Tailscale features that the inventory asks for and the server probably lacks."""
    server = (deployment.tailscale_login_server or OWN_SERVER).rstrip("/")
    if deployment.tailscale and deployment.tailscale_serve and server not in OWN_SERVERS:
        yield (
            f"tailscale_serve: needs HTTPS certificates, which tailscale_login_server ({server}), a"
            " control server of your own, may not have; without them nothing is shown, and the"
            " deploy ends with code 1: name the ports in tailscale_serve_http instead"
        )


def auth_key(deployment: Deployment) -> str | None:
    """Return the key that the host logs in with; None: a person logs it in.

    Raises SettingsError, never with the key.
    """
    name = deployment.tailscale_auth_key_file
    if name is None:
        return None
    if secret_files.is_secret(name):
        raise SettingsError(f"{secret_files.ITSELF}; expected {EXPECTED_KEY}")
    key = read_secret(Path(name), EXPECTED_KEY)
    # A private control server has keys in its own form.
    if deployment.tailscale_login_server is None and not key.startswith((AUTH_KEY, CLIENT_SECRET)):
        raise SettingsError(f"{name}: what is in it begins in another way; expected {EXPECTED_KEY}")
    return key + CLIENT_OPTIONS if key.startswith(CLIENT_SECRET) and "?" not in key else key


def login_flags(
    deployment: Deployment,
    found: Tailnet,
) -> list[str]:
    """Return the flags of `tailscale up`: the inventory's, and otherwise the host's present ones.

    Tailscale refuses a login that does not mention present preferences, so they are kept. The ssh
    server is switched separately (ssh_switch.py), which checks who gets in afterwards.
    """
    flags = _present_flags(found)
    named = {
        "accept-routes": deployment.tailscale_accept_routes and "true",
        "hostname": deployment.tailscale_hostname,
        "advertise-tags": ",".join(deployment.tailscale_tags),
        "login-server": deployment.tailscale_login_server,
    }
    flags |= {flag: value for flag, value in named.items() if value}
    if deployment.tailscale_accept_routes is False:
        flags.pop("accept-routes", None)
    if not deployment.tailscale_login_server and found.server not in OWN_SERVERS:
        flags["login-server"] = OWN_SERVER
    return [f"--{flag}={value}" for flag, value in flags.items()]


def relogin_command(
    found: Tailnet,
    tags: Iterable[str],
) -> str:
    """Return the command that logs a host in again with these tags and keeps everything else."""
    flags = _present_flags(found) | {"advertise-tags": ",".join(tags)}
    words = [
        "tailscale",
        "up",
        "--force-reauth",
        *(f"--{flag}={value}" for flag, value in flags.items()),
    ]
    return f"`{shlex.join(words)}` there (not over Tailscale: it ends that connection)"


def _present_flags(found: Tailnet) -> dict[str, str]:
    """Return the host's preferences that differ from the default, as flags of `tailscale up`."""
    has = found.preferences
    routes = list(has.get("AdvertiseRoutes") or ())
    is_exit = all(route in routes for route in EVERYWHERE)
    switched = {
        "accept-routes": has.get("RouteAll"),
        "advertise-connector": (has.get("AppConnector") or {}).get("Advertise"),
        "advertise-exit-node": is_exit,
        "exit-node-allow-lan-access": has.get("ExitNodeAllowLANAccess"),
        "report-posture": has.get("PostureChecking"),
        "shields-up": has.get("ShieldsUp"),
        "ssh": has.get("RunSSH"),
        "stateful-filtering": has.get("NoStatefulFiltering") is False,
    }
    by_default = {
        "accept-dns": has.get("CorpDNS", True),
        "snat-subnet-routes": not has.get("NoSNAT"),
    }
    told = {
        "advertise-routes": ",".join(
            route for route in routes if not (is_exit and route in EVERYWHERE)
        ),
        "advertise-tags": ",".join(has.get("AdvertiseTags") or ()),
        "exit-node": (
            f"auto:{has['AutoExitNode']}" if has.get("AutoExitNode") else has.get("ExitNodeIP")
        ),
        "hostname": has.get("Hostname"),
        "login-server": found.server if found.server not in OWN_SERVERS else "",
        "netfilter-mode": {0: "off", 1: "nodivert"}.get(has.get("NetfilterMode", 2)),
        "operator": has.get("OperatorUser"),
    }
    flags = {flag: "true" for flag, value in switched.items() if value}
    flags |= {flag: "false" for flag, value in by_default.items() if not value}
    return flags | {flag: str(value) for flag, value in told.items() if value}


def kept_flags(found: Tailnet) -> list[str]:
    """Return flags of `tailscale set` for preferences that `tailscale up` would reset."""
    has = found.preferences
    update = has.get("AutoUpdate") or {}
    values = {
        "auto-update": update.get("Apply"),
        "update-check": None if update.get("Check", True) else False,
        "webclient": has.get("RunWebClient") or None,
        "relay-server-port": has.get("RelayServerPort"),
    }
    shown = {
        flag: _flag(value) if isinstance(value, bool) else str(value)
        for flag, value in values.items()
    }
    return [f"--{flag}={shown[flag]}" for flag, value in values.items() if value is not None]


def changed_flags(
    deployment: Deployment,
    found: Tailnet,
) -> list[str]:
    """Return flags of `tailscale set` for a connected host's differences, apart from ssh."""
    flags = []
    routes = deployment.tailscale_accept_routes
    if routes is not None and bool(found.preferences.get("RouteAll")) != routes:
        flags.append(f"--accept-routes={_flag(routes)}")
    hostname = deployment.tailscale_hostname
    if hostname and found.preferences.get("Hostname") != hostname:
        flags.append(f"--hostname={hostname}")
    return flags


def _flag(value: bool) -> str:
    return "true" if value else "false"

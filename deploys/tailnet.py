"""What Tailscale's own programs say of a host, and what they are told. Knows nothing of pyinfra.

The forms are those of `tailscale status --json`, `tailscale debug prefs` and `tailscale serve status --json`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deploys import secretfiles
from deploys.deployment import Deployment
from worker.errors import SettingsError

RUNNING, NEEDS_APPROVAL = "Running", "NeedsMachineAuth"
AUTH_KEY, CLIENT_SECRET = "tskey-auth-", "tskey-client-"
# A key that an OAuth client makes is for an ephemeral node that waits for approval, unless it is told otherwise.
CLIENT_OPTIONS = "?ephemeral=false&preauthorized=true"
EXPECTED_KEY = f"a file with an auth key ({AUTH_KEY}...) or the secret of an OAuth client ({CLIENT_SECRET}...)"
WARN_BEFORE = timedelta(days=14)
APPROVAL_URL = "https://login.tailscale.com/admin/machines"


@dataclass(frozen=True, slots=True)
class Tailnet:
    """A host's place in a tailnet. `state`: the daemon's own word for it; None: it does not answer.

    `serves`: HTTPS port in the tailnet -> what is shown there. `ours`: what an earlier deploy had shown there.
    `expires`: when the node's key does; None: never.
    """

    is_installed: bool = False
    state: str | None = None
    login_url: str | None = None
    addresses: tuple[str, ...] = ()
    expires: datetime | None = None
    preferences: Mapping[str, Any] = field(default_factory=dict)
    serves: Mapping[int, str] = field(default_factory=dict)
    ours: Mapping[int, str] = field(default_factory=dict)

    @property
    def is_connected(self) -> bool:
        return self.state == RUNNING

    @property
    def runs_ssh(self) -> bool:
        """Return whether Tailscale's own ssh server answers at port 22 of the host's addresses in the tailnet."""
        return bool(self.preferences.get("RunSSH"))

    def worries(self, now: datetime, login_server: str | None) -> Iterator[str]:
        """What a person should know of a connected host."""
        if self.expires is not None and self.expires - now < WARN_BEFORE:
            days = (self.expires - now).days
            when = "has expired" if self.expires <= now else f"expires in {days} days ({self.expires:%Y-%m-%d})"
            yield f"its Tailscale key {when}; run `tailscale up --force-reauth` there, or disable key expiry"
        server = self.preferences.get("ControlURL")
        if login_server and server and str(server).rstrip("/") != login_server.rstrip("/"):
            yield f"logged in at {server}, not at {login_server}; it is left alone: `tailscale logout` there to move it"


def parse(text: str) -> Tailnet:
    """What the fact's command printed: one JSON object with status, prefs and serve, each null if it gave no answer.

    And ours: the ports that a deploy has had shown, each before what is there.
    """
    said = json.loads(text)
    status, serve = said["status"] or {}, said["serve"] or {}
    me = status.get("Self") or {}
    expiry = me.get("KeyExpiry")
    return Tailnet(
        is_installed=True,
        state=status.get("BackendState"),
        login_url=status.get("AuthURL") or None,
        addresses=tuple(status.get("TailscaleIPs") or me.get("TailscaleIPs") or ()),
        expires=datetime.fromisoformat(expiry).astimezone(UTC) if expiry else None,
        preferences=said["prefs"] or {},
        serves={
            int(name.rpartition(":")[2]): str(handlers["/"]["Proxy"])
            for name, web in (serve.get("Web") or {}).items()
            if "Proxy" in (handlers := web.get("Handlers") or {}).get("/", {})
        },
        ours={int(port): target for port, target in zip(*[iter((said.get("ours") or "").split())] * 2, strict=True)},
    )


def mistakes(deployment: Deployment) -> Iterator[str]:
    """What is wrong with the inventory's Tailscale keys, as far as the operator's side can know."""
    if not deployment.tailscale:
        return
    try:
        key = auth_key(deployment)
    except SettingsError as error:
        yield f"tailscale_auth_key_file: {error}; expected {EXPECTED_KEY}"
        return
    if key is not None and key.startswith(CLIENT_SECRET) and not deployment.tailscale_tags:
        yield "tailscale_tags: none; keys of an OAuth client need one that the client may give, such as tag:hivewright"


def auth_key(deployment: Deployment) -> str | None:
    """What the host logs in with. None: a person does. Raises SettingsError with the reason, never with the key."""
    name = deployment.tailscale_auth_key_file
    if name is None:
        return None
    if secretfiles.is_secret(name):
        raise SettingsError(secretfiles.ITSELF)
    try:
        key = Path(name).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}: {error.strerror if isinstance(error, OSError) else 'not text'}") from None
    if not key or len(key.split()) != 1:
        raise SettingsError(f"{name}: {len(key.split())} words")
    # A control server of one's own has keys of its own form.
    if deployment.tailscale_login_server is None and not key.startswith((AUTH_KEY, CLIENT_SECRET)):
        raise SettingsError(f"{name}: what is in it begins in another way")
    return key + CLIENT_OPTIONS if key.startswith(CLIENT_SECRET) and "?" not in key else key


def login_flags(deployment: Deployment, found: Tailnet) -> list[str]:
    """Return the flags of `tailscale up`. Tailscale's ssh server stays as it is: that is switched when it can be seen
    who gets in afterwards."""
    flags = ["--reset", f"--ssh={_flag(found.runs_ssh)}"]
    flags.append(f"--accept-routes={_flag(deployment.tailscale_accept_routes)}")
    if deployment.tailscale_hostname:
        flags.append(f"--hostname={deployment.tailscale_hostname}")
    if deployment.tailscale_tags:
        flags.append(f"--advertise-tags={','.join(deployment.tailscale_tags)}")
    if deployment.tailscale_login_server:
        flags.append(f"--login-server={deployment.tailscale_login_server}")
    return flags


def changed_flags(deployment: Deployment, found: Tailnet) -> list[str]:
    """Return the flags of `tailscale set` for what a host that is logged in has otherwise, without ssh."""
    flags = []
    if bool(found.preferences.get("RouteAll")) != deployment.tailscale_accept_routes:
        flags.append(f"--accept-routes={_flag(deployment.tailscale_accept_routes)}")
    hostname = deployment.tailscale_hostname
    if hostname and found.preferences.get("Hostname") != hostname:
        flags.append(f"--hostname={hostname}")
    return flags


def _flag(value: bool) -> str:
    return "true" if value else "false"

"""Find when this host's Tailscale key expires, with `tailscale status --json`."""

import json
import subprocess
from datetime import datetime

QUERY_SECONDS = 5.0
SOON_SECONDS = 7 * 86400.0
"""A key that expires within this many seconds needs attention."""
RENEW = "deploy again with an auth key, or disable its expiry in Tailscale's console"


def expires_at() -> float | None:
    """Return the time in Unix seconds; None: the key does not expire, or there is no Tailscale."""
    try:
        said = subprocess.run(
            ["tailscale", "status", "--json", "--peers=false"],
            capture_output=True,
            timeout=QUERY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # not installed, or not running
    return parse(said.stdout)


def parse(status: str | bytes) -> float | None:
    """Return the time in the output of `tailscale status --json`; None: never, or not known."""
    try:
        expiry = json.loads(status)["Self"]["KeyExpiry"]
        return datetime.fromisoformat(str(expiry).replace("Z", "+00:00")).timestamp()
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def problem(expires_at: float | None, now: float) -> str | None:
    """Return cause and fix if the key has expired or expires soon; None if it does not."""
    if expires_at is None or expires_at - now > SOON_SECONDS:
        return None
    days = (expires_at - now) / 86400
    when = f"expires in {days:.0f} days" if days > 0 else f"expired {abs(days):.0f} days ago"
    return f"the Tailscale key {when}, and the host is then cut off; {RENEW}"

"""When this host's Tailscale key expires, from `tailscale status --json`."""

import json
import subprocess
from datetime import datetime

QUERY_SECONDS = 5.0


def expires_at() -> float | None:
    """Return the time in Unix seconds; None: the key does not expire, or there is no Tailscale."""
    try:
        said = subprocess.run(
            ["tailscale", "status", "--json", "--peers=false"],
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,
            check=False,
        )
        expiry = json.loads(said.stdout)["Self"]["KeyExpiry"]
        return datetime.fromisoformat(str(expiry).replace("Z", "+00:00")).timestamp()
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError, TypeError):
        return None  # not installed, not running, or a key that does not expire

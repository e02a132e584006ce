#!/usr/bin/env python3
"""Stands in for `tailscale` and its daemon; test_lab_tailscale.py uses the real ones.

It refuses what tailscale 1.98 refuses: a login that does not mention every present setting, its ssh
server in a tailnet without it, HTTPS without certificates, a port that is used otherwise. Without a
key `up` waits, with a login URL in `status --json`, until the file `approved` exists next to this
program. Every command line is appended to `calls`. Queries write nothing, and changes are made
under a lock.
"""

import fcntl
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STATE = HERE / "state.json"
OWN_SERVER = "https://controlplane.tailscale.com"
CAPABILITIES = {"ssh": True, "https": True, "approval": False}
LOGGED_OUT = {
    "BackendState": "NeedsLogin",
    "AuthURL": "",
    "keys": [],
    "prefs": {},
    "serve": {},
    **CAPABILITIES,
}
DEFAULTS = {
    "ControlURL": OWN_SERVER,
    "RouteAll": False,
    "CorpDNS": True,
    "RunSSH": False,
    "RunWebClient": False,
    "Hostname": "",
    "AdvertiseTags": None,
    "AdvertiseRoutes": None,
}
PREFERENCES = {
    "login-server": "ControlURL",
    "accept-routes": "RouteAll",
    "accept-dns": "CorpDNS",
    "ssh": "RunSSH",
    "webclient": "RunWebClient",
    "hostname": "Hostname",
    "advertise-tags": "AdvertiseTags",
    "advertise-routes": "AdvertiseRoutes",
}
# What `up` can't be told, and sets back to the default.
ONLY_SET = ("RunWebClient",)
NOT_SETTINGS = ("auth-key", "timeout", "reset", "force-reauth")


class RefusedError(Exception):
    """Print the real program's error and exit with 1."""


def load() -> dict[str, Any]:
    state: dict[str, Any] = LOGGED_OUT | (json.loads(STATE.read_text()) if STATE.exists() else {})
    state["prefs"] = DEFAULTS | state["prefs"]
    return state


@contextmanager
def changed() -> Iterator[dict[str, Any]]:
    """Provide the state under a lock; a refused change is not saved."""
    with (HERE / "state.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = load()
        yield state
        (HERE / "state.new").write_text(json.dumps(state))
        (HERE / "state.new").rename(STATE)


def main(arguments: list[str]) -> int:
    with (HERE / "calls").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    command, rest = arguments[0], arguments[1:]
    flags = {}
    for word in rest:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            flags[name] = value or ("" if "=" in word else "true")
    try:
        if command == "status":
            print(json.dumps(status(load()), indent=2))
        elif command == "debug" and rest == ["prefs"]:
            print(json.dumps(load()["prefs"], indent=2))
        elif command == "serve" and rest[:2] == ["status", "--json"]:
            print(json.dumps(load()["serve"], indent=2))
        elif command == "serve":
            serve(flags, rest[-1])
        elif command == "set":
            with changed() as state:
                prefer(state, flags)
        elif command == "up":
            up(flags)
        elif command == "down":
            with changed() as state:
                state["BackendState"] = (
                    "Stopped" if state["BackendState"] == "Running" else state["BackendState"]
                )
        else:
            raise RefusedError(f"unknown subcommand: {command}")
    except RefusedError as refused:
        print(refused, file=sys.stderr)
        return 1
    return 0


def up(flags: dict[str, str]) -> None:
    with changed() as state:
        if not flags and state["BackendState"] == "Stopped":
            state["BackendState"] = "Running"
            return
        forgotten = [
            flag
            for flag, name in PREFERENCES.items()
            if name not in ONLY_SET and flag not in flags and state["prefs"][name] != DEFAULTS[name]
        ]
        if forgotten and "reset" not in flags:
            raise RefusedError(
                f"Error: changing settings via 'tailscale up' requires mentioning all: {forgotten}"
            )
        state["prefs"] = dict(DEFAULTS)
        prefer(state, {flag: value for flag, value in flags.items() if flag not in NOT_SETTINGS})
        if "auth-key" not in flags:
            state["AuthURL"] = f"https://login.tailscale.com/a/{HERE.name}"
    key = (
        Path(flags["auth-key"].removeprefix("file:")).read_text().strip()
        if "auth-key" in flags
        else None
    )
    if key is not None and "wrong" in key:
        raise RefusedError("backend error: invalid key: API key does not exist")
    if key is None:
        wait_for("approved", flags)
    with changed() as state:
        state["keys"] += [key] if key is not None else []
        state |= {
            "BackendState": "NeedsMachineAuth" if state["approval"] else "Running",
            "AuthURL": "",
        }
    if state["approval"]:
        wait_for("approved", flags)
        with changed() as state:
            state["BackendState"] = "Running"


def wait_for(name: str, flags: dict[str, str]) -> None:
    deadline = time.monotonic() + float(flags["timeout"].removesuffix("s"))
    while not (HERE / name).exists():
        if time.monotonic() > deadline:
            raise RefusedError("timeout waiting for Tailscale service to enter a Running state")
        time.sleep(0.05)


def prefer(state: dict[str, Any], flags: dict[str, str]) -> None:
    if flags.get("ssh") == "true" and state["BackendState"] == "Running" and not state["ssh"]:
        raise RefusedError("Unable to enable local Tailscale SSH server; not enabled on Tailnet.")
    for flag, value in flags.items():
        if flag not in PREFERENCES:
            raise RefusedError(f"flag provided but not defined: --{flag}")
        if flag.startswith("advertise-"):
            state["prefs"][PREFERENCES[flag]] = value.split(",") if value else None
        else:
            state["prefs"][PREFERENCES[flag]] = (
                value == "true" if value in ("true", "false") else value
            )


def serve(flags: dict[str, str], target: str) -> None:
    scheme = "https" if "https" in flags else "http" if "http" in flags else "tcp"
    port, path = flags[scheme], flags.get("set-path", "/")
    with changed() as state:
        tcp, web = (state["serve"].setdefault(kind, {}) for kind in ("TCP", "Web"))
        name = f"{HERE.name}.ts.net:{port}"
        handlers = web.get(name, {}).get("Handlers", {})
        if target == "off":
            if scheme != "tcp" and path not in handlers:
                raise RefusedError("error: failed to remove web serve: handler does not exist")
            left = {
                each: handler
                for each, handler in handlers.items()
                if each != path and "set-path" in flags
            }
            web[name] = {"Handlers": left}
            if not left:
                del web[name], tcp[port]
        elif scheme == "tcp":
            tcp[port] = {"TCPForward": target}
        elif scheme == "https" and not state["https"]:
            raise RefusedError("error enabling https feature: error 404 Not Found: not found:")
        elif "TCPForward" in tcp.get(port, {}):
            raise RefusedError(
                "error: failed apply web serve: cannot serve web; already serving TCP"
            )
        elif port in tcp and scheme.upper() not in tcp[port]:
            raise RefusedError(
                f'want to serve "{scheme}", but port {port} is already serving something else'
            )
        else:
            tcp[port] = {scheme.upper(): True}
            web[name] = {"Handlers": {**handlers, path: {"Proxy": target}}}


def status(state: dict[str, Any]) -> dict[str, Any]:
    is_on = state["BackendState"] == "Running"
    capabilities = {"https://tailscale.com/cap/ssh": []} if state["ssh"] else {}
    me = {
        "ID": "n1",
        "HostName": "h",
        "TailscaleIPs": ["100.64.0.7"] if is_on else None,
        "Online": is_on,
        "CapMap": capabilities,
        "Tags": state.get("tags", state["prefs"]["AdvertiseTags"]),
    }
    if "expires" in state:
        me["KeyExpiry"] = state["expires"]
    return {
        "Version": "1.98.10",
        "TUN": True,
        "BackendState": state["BackendState"],
        "AuthURL": state["AuthURL"],
        "TailscaleIPs": me["TailscaleIPs"],
        "Self": me,
        "Peer": None,
        "Health": state.get("health", []),
        "CertDomains": ["h.ts.net"] if state["https"] else None,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

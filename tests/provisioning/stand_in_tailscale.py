#!/usr/bin/env python3
"""Stands in for the program `tailscale`, and its daemon, which can't be had here. For the tests alone.

It answers as Tailscale's documentation (kb/1241 `up`, kb/1080 `cli`) and the source of its command line say: `up` with
an auth key ends when it is connected; without one it waits, with a login URL in `status --json`, until somebody has
opened that, here: until the file `approved` is beside this program. Every command line is added to `calls`.
"""

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STATE = HERE / "state.json"
LOGGED_OUT = {
    "BackendState": "NeedsLogin", "AuthURL": "", "keys": [], "serve": {},
    "prefs": {"ControlURL": "https://controlplane.tailscale.com", "RunSSH": False, "RouteAll": False, "Hostname": ""},
}  # fmt: skip


def main(arguments: list[str]) -> int:
    with (HERE / "calls").open("a") as calls:
        calls.write(" ".join(arguments) + "\n")
    state = json.loads(STATE.read_text()) if STATE.exists() else LOGGED_OUT
    command, rest = arguments[0], arguments[1:]
    flags = dict(f.removeprefix("--").partition("=")[::2] for f in rest if f.startswith("--"))
    if command == "status":
        print(json.dumps(status(state), indent=2))
    elif command == "debug" and rest == ["prefs"]:
        print(json.dumps(state["prefs"], indent=2))
    elif command == "serve" and rest[:2] == ["status", "--json"]:
        print(json.dumps({"Web": {f"{HERE.name}.ts.net:{p}": {"Handlers": {"/": {"Proxy": t}}}
                                  for p, t in state["serve"].items()}} if state["serve"] else {}))  # fmt: skip
    elif command == "serve" and rest[-1] == "off":
        del state["serve"][flags["https"]]
    elif command == "serve":
        state["serve"][flags["https"]] = rest[-1]
    elif command == "set":
        prefer(state, flags)
    elif command == "up":
        return up(state, flags)
    else:
        print(f"unknown subcommand: {command}", file=sys.stderr)
        return 1
    save(state)
    return 0


def up(state: dict, flags: dict[str, str]) -> int:
    prefer(state, flags)
    if "auth-key" in flags:
        key = Path(flags["auth-key"].removeprefix("file:")).read_text().strip()
        if "wrong" in key:
            print("backend error: invalid key: API key does not exist", file=sys.stderr)
            return 1
        state["keys"].append(key)
    else:
        state["AuthURL"] = f"https://login.tailscale.com/a/{HERE.name}"
        save(state)
        deadline = time.monotonic() + float(flags["timeout"].removesuffix("s"))
        while not (HERE / "approved").exists():
            if time.monotonic() > deadline:
                print("timeout waiting for Tailscale service to enter a Running state", file=sys.stderr)
                return 1
            time.sleep(0.05)
    state |= {"BackendState": "Running", "AuthURL": ""}
    save(state)
    return 0


def prefer(state: dict, flags: dict[str, str]) -> None:
    names = {"ssh": "RunSSH", "accept-routes": "RouteAll", "hostname": "Hostname", "login-server": "ControlURL"}
    for flag, name in names.items():
        if flag in flags:
            state["prefs"][name] = flags[flag] == "true" if flags[flag] in ("true", "false") else flags[flag]


def status(state: dict) -> dict:
    is_on = state["BackendState"] == "Running"
    me = {"ID": "n1", "HostName": "h", "TailscaleIPs": ["100.64.0.7"] if is_on else None, "Online": is_on}
    if "expires" in state:
        me["KeyExpiry"] = state["expires"]
    return {
        "Version": "1.90.0", "TUN": True, "BackendState": state["BackendState"], "AuthURL": state["AuthURL"],
        "TailscaleIPs": me["TailscaleIPs"], "Self": me, "Peer": None,
    }  # fmt: skip


def save(state: dict) -> None:
    (HERE / "state.new").write_text(json.dumps(state))
    (HERE / "state.new").rename(STATE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

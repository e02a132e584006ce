"""Stands in for pyinfra and its hosts, for rollouts over more hosts than a lab has.

The inventory is a JSON file: `hosts`, and `bad`, a commit whose workers end with code 1. The state
of each host is in a file next to it. With a file .slow next to the inventory no deploy ends, and
with one .but every deploy lacks something. Answers have the form of pyinfra 3.10.0's.
"""

import argparse
import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

OLD = "a" * 40


def state_of(folder: Path, host: str) -> dict[str, Any]:
    file = folder / f"{host}.json"
    state: dict[str, Any] = {"commit": OLD, "previous": None, "started_at": 1000.0}
    return json.loads(file.read_text()) if file.exists() else state


def change(folder: Path, host: str, commit: str | None) -> None:
    """Make the host run a commit, or the previous one (None), atomically and under a lock."""
    with (folder / f"{host}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = state_of(folder, host)
        new = {
            "commit": commit or state["previous"],
            "previous": state["commit"],
            "started_at": time.time(),
        }
        partial = folder / f"{host}.new"
        partial.write_text(json.dumps(new))
        partial.rename(folder / f"{host}.json")


def facts(state: dict[str, Any], bad: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    is_ill = state["commit"] == bad
    report = {
        "unit": "hivewright-worker@0.service",
        "active_state": "failed" if is_ill else "active",
        "status": {"activity": "training", "last_error": "it is broken" if is_ill else None},
        "started_at": state["started_at"],
        "restarts": 0,
        "exit_status": 1 if is_ill else 0,
        "finished": [] if is_ill else [state["started_at"] + 5],
    }
    host = {"commit": state["commit"], "deployed": state["commit"], "previous": state["previous"]}
    return host, [report]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-y", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--limit", action="append", default=[])
    parser.add_argument("--data", default="")
    parser.add_argument("inventory", type=Path)
    parser.add_argument("what", nargs="+")
    options = parser.parse_args()
    said = json.loads(options.inventory.read_text())
    folder = options.inventory.with_suffix(".state")
    folder.mkdir(exist_ok=True)
    names = options.limit or said["hosts"]
    if options.what[0] == "debug-inventory":
        print(
            json.dumps(
                [{"name": name, "groups": ["workers"], "data": said["data"]} for name in names]
            )
        )
    elif options.what[0] == "fact":
        found = {name: facts(state_of(folder, name), said["bad"]) for name in names}
        kinds = enumerate(("fleet_facts.HostStates", "fleet_facts.NodeReports"))
        print(
            json.dumps({kind: {name: both[n] for name, both in found.items()} for n, kind in kinds})
        )
    else:
        (name,) = names
        if folder.with_suffix(".slow").exists():
            time.sleep(60)
        change(
            folder,
            name,
            None
            if options.what[0] == "deploys.rollback.go_back"
            else options.data.partition("=")[2],
        )
        print(f"--> Starting operation: for {name}", file=sys.stderr)
        print(json.dumps({"results": {"totals": {"success": 4}}}), flush=True)
        if folder.with_suffix(".but").exists():
            lacking = ["tailscale_serve: 443: its tailnet has no HTTPS certificates"]
            report = {"hosts": {name: {"state": "done", "lacking": lacking}}}
            Path(os.environ["HIVEWRIGHT_RUN_REPORT"]).write_text(json.dumps(report))
            sys.exit(1)


if __name__ == "__main__":
    main()

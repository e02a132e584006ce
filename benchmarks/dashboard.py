"""The dashboard over a long history, and the sign-in page: bytes and seconds of each page.

    python -m benchmarks.dashboard                       # 1,000 peers, 100,000 rounds
    python -m benchmarks.dashboard --peers 100 --rounds 1000 --json

A synthetic history is written to a temporary folder, and the dashboard is run on it as the process
that it is, without a chain. The sign-in page is that of a new account service; its bounds are 50 KB
and 0.3 s. A page counts with everything that it loads: style, scripts, curves.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import requests

from tests.account.hosting import hosted
from tests.chain.account_service import serving
from tests.pages.dashboards import showing, with_dashboard
from worker import settings
from worker.dashboard.counts import Peer
from worker.dashboard.store import CURVE_ROUNDS, RECENT_ROUNDS, SPAN_ROUNDS, Store

PAGES = (
    "/",
    "/peers",
    "/peers?sort=wins&find=otter&page=1",
    "/peer?id=QmPeer7",
    "/chain",
    "/events",
)
SIGN_IN = "/sign-in"
_LOADED = re.compile(r'(?:src|href|data-curve)="(/[^"]*\.(?:css|js|svg)|/api/curve[^"]*)"')


def fill(folder: Path, num_peers: int, num_rounds: int) -> None:
    """Write a history: all rounds, and the rewards of each peer in the newest ones and as sums."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    peers = {
        f"QmPeer{number}": Peer(
            total=number * 1000, rewards={num_rounds - 1: _reward(num_rounds - 1, number)}
        )
        for number in range(num_peers)
    }
    first_recent = max(0, num_rounds - RECENT_ROUNDS)
    connection = store._connection
    with store.writing():
        store.put_peers(peers, {})
        connection.executemany(
            "INSERT INTO rounds VALUES (?, ?, ?)",
            ((n, num_peers * _reward(n, 0), num_peers) for n in range(num_rounds)),
        )
        connection.executemany(
            "INSERT INTO spans VALUES (?, ?, ?, ?)",
            (
                (peer, span, SPAN_ROUNDS * _reward(span * SPAN_ROUNDS, peer), SPAN_ROUNDS)
                for peer in range(1, num_peers + 1)
                for span in range(num_rounds // SPAN_ROUNDS)
            ),
        )
        recent = [(p, n) for n in range(first_recent, num_rounds) for p in range(1, num_peers + 1)]
        connection.executemany(
            "INSERT INTO rewards VALUES (?, ?, 0, ?, ?, 1)",
            ((peer, n, _reward(n, peer), n) for peer, n in recent),
        )
        connection.executemany(
            "INSERT INTO transactions VALUES (?, ?, 'RewardSubmitted', ?, ?, ?)",
            ((n, f"0x{n:032x}{p:032x}", p, n, str(_reward(n, p))) for p, n in recent),
        )
        for family in range(8):
            name = f"family/task-{family}"
            for width, kept in CURVE_ROUNDS.items():
                numbers = range(0, num_rounds, width)
                connection.executemany(
                    "INSERT INTO curves VALUES (?, ?, ?, ?, 1)",
                    (
                        (name, width, n, _reward(n, family) / 1000)
                        for n in numbers
                        if n >= num_rounds - kept
                    ),
                )
        known = {"contract": "0x" + "ab" * 20, "chain_id": 31337, "round": num_rounds}
        store.set_mark("known", json.dumps({**known, "updated_at": time.time()}))
    store.close()


def _reward(round: int, peer: int) -> int:
    return int(400 + 300 * math.sin(round / 900 + peer))


def measure(num_peers: int, num_rounds: int) -> dict[str, dict[str, float]]:
    """Return for each page its `bytes` and the `seconds` until all of them came."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder / "dashboard", num_peers, num_rounds)
        parsed = settings.parse({"chain": {"rpc_url": "http://127.0.0.1:1"}}, "benchmark")
        targets = folder / "targets.json"
        targets.write_text("[]")
        of = with_dashboard(
            parsed,
            folder / "dashboard",
            show_fleet=True,
            targets_file=targets,
        )
        with showing(of) as dashboard:
            found = {page: _measure(dashboard.url, page) for page in PAGES}
        with serving(hosted(parsed, folder / "account")) as service:
            return found | {SIGN_IN: _measure(service.url, SIGN_IN)}


def _measure(url: str, page: str) -> dict[str, float]:
    began = time.perf_counter()
    text = _get(url + page)
    loaded = {each.replace("&amp;", "&") for each in _LOADED.findall(text.decode())}
    size = len(text) + sum(len(_get(url + each)) for each in loaded)
    return {"bytes": size, "seconds": round(time.perf_counter() - began, 3)}


def _get(url: str) -> bytes:
    answer = requests.get(url, timeout=60)
    answer.raise_for_status()
    return answer.content


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options.peers, options.rounds)
    if options.json:
        json.dump({"peers": options.peers, "rounds": options.rounds, "pages": found}, sys.stdout)
        print()
        return
    for page, figures in found.items():
        print(f"{page:45} {figures['bytes'] / 1000:7.1f} KB {figures['seconds']:7.3f} s")


if __name__ == "__main__":
    main()

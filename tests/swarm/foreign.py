"""A node of somebody else's making on our DHT, as a program: `foreign.py BOOTNODE FOLDER`.

It is hivemind's own `DHT`, without our validators. It stores garbage and records that look like
ours under our keys, also in its own storage, where others look them up. Says "stored N" and then
how many members it reads, until its standard input closes.
"""

import sys
import time
from pathlib import Path

import hivemind
import msgpack

from worker.swarm import identity
from worker.swarm.protocol import messages  # not dht: that replaces parts of hivemind

KEYS = [
    "hivewright/1/members/0/0",
    *(f"hivewright/1/members/1/{bucket}" for bucket in range(8)),
    "somebody else's",
]
WRONG_DOMAIN = b"hivewright/groups/3\n"


def records(folder: Path, soon: int) -> list[tuple[str, bytes]]:
    """Pairs of a subkey and a value that look right, and expire at `soon`."""
    liar, other = identity.create(folder / "liar"), identity.create(folder / "other")
    nowhere = ["/ip4/127.0.0.1/tcp/1", "/ip4/203.0.113.1/tcp/1"]
    genuine = messages.seal_member(liar, nowhere, 5, soon - 60, soon, ["sums 1"])
    public_key, signature, body = msgpack.unpackb(genuine.sealed, raw=False)
    escapes = messages.seal_member(
        other, ["/ip4/127.0.0.1/tcp/1/\x1b[2J"], 5, soon - 60, soon, ["sums 1"]
    )
    forged = msgpack.packb([public_key, other.sign(messages._MEMBER_DOMAIN + body), body])
    elsewhere = msgpack.packb([public_key, liar.sign(WRONG_DOMAIN + body), body])
    cut = msgpack.packb([public_key, signature, body[:-1]])
    return [
        (liar.peer_id, genuine.sealed),  # signed by its key and yet nobody is there
        (other.peer_id, genuine.sealed),
        (other.peer_id, escapes.sealed),
        ("QmForged", forged),
        ("QmElsewhere", elsewhere),
        ("QmCut", cut),
        ("", b""),
        (
            "x" * 3000,
            b"x" * 8000,
        ),  # more than 15 KB, and hivemind's own process would be the one that ends
    ]


def main(bootnode: str, folder: Path) -> None:
    dht = hivemind.DHT(initial_peers=[bootnode], host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    soon, stored = int(time.time()) + 60, 0
    for number, key in enumerate(KEYS):
        for subkey, value in records(folder / str(number), soon):
            stored += bool(dht.store(key, value, soon, subkey=subkey))
        for value in ({"peer": 1}, [1, [2, [3]]], "text", 10**18, None, b"y" * 8000):
            stored += bool(dht.store(key, value, soon, subkey="odd"))
            stored += bool(dht.store(key, value, soon))
    print(f"stored {stored}", flush=True)
    for _ in sys.stdin:
        found = dht.get(KEYS[0], latest=True)
        members = found.value if found is not None and isinstance(found.value, dict) else {}
        print(f"members {len(members)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

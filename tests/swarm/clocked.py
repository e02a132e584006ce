"""A peer whose clock is off, as a program: `clocked.py SECONDS BOOTNODE FOLDER`.

Prints its peer id. For each line, a number of peers: waits until it knows that many, collects round
1, and names those whose groups came.
"""

import sys
import time
from pathlib import Path

_real_time = time.time
_offset = float(sys.argv[1])
time.time = lambda: _real_time() + _offset  # before anything of ours or hivemind's has taken it

from swarm_lab import Lab, make_groups, wait_until  # noqa: E402


def main(bootnode: str, folder: Path) -> None:
    lab = Lab(folder.parent)
    lab.bootnodes, lab.announce_every_seconds = (bootnode,), 20.0
    swarm = lab.peer(folder.name)
    me = swarm.status().peer_id
    swarm.publish(1, make_groups(me, 1))
    print(me, flush=True)
    for line in sys.stdin:
        wait_until(lambda num=int(line): len(swarm.peers()) >= num, 20, "the others are known")  # type: ignore[misc]
        print(" ".join(sorted({g.peer_id or "" for g in swarm.collect(1, 18).groups})), flush=True)
    lab.close()


if __name__ == "__main__":
    main(sys.argv[2], Path(sys.argv[3]))

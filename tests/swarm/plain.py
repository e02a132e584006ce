"""A plain hivemind DHT node, as a program: says its address, then serves until its standard input
closes.
"""

import sys

import hivemind

if __name__ == "__main__":
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    print(dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.read()

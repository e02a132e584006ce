"""A program: a plain hivemind DHT node that prints its address and serves until stdin closes."""

import sys

import hivemind

if __name__ == "__main__":
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    print(dht.get_visible_maddrs()[0], flush=True)
    sys.stdin.read()

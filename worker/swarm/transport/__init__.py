"""The libp2p daemon and its streams."""

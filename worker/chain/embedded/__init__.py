"""The chain that hivewright hosts itself: anvil, its door and gate, snapshots and pruning."""

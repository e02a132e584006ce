"""The dashboard: a read-only page about the swarm."""

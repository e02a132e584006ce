"""Status, health checks, metrics and logs of a node."""

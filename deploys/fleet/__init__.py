"""Commands for a whole fleet: rollout, status, backup and maintenance."""

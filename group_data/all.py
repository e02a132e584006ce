"""Data of every host of every inventory; defaults are in docs/configuration.md."""

# pyinfra's limit, in seconds, for one command on a host, where the deploy does not know that it
# takes longer.
_timeout = 120

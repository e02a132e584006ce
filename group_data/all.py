"""For every host of every inventory. Only departures from the defaults are here
(docs/configuration.md has those)."""

# pyinfra's limit, in seconds, for one command on a host, where the deploy does not know that it
# takes longer.
_timeout = 120

"""For every host of every inventory. Only departures from the defaults stand here (docs/configuration.md has those)."""

# Limits, in seconds, without which a host that vanishes holds the run of all others for ever (paramiko's own is an
# hour): for one command, where the deploy does not know that it takes longer; and for opening a channel to the host.
_timeout = 120
ssh_paramiko_connect_kwargs = {"channel_timeout": 30}

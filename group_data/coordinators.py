"""Data of the host in the group `coordinators`, which runs chain, keeper and account service."""

# The other hosts reach the account service here, and only there; which address that is, is the
# inventory's to say (account_host). The chain itself stays on loopback: whoever reaches anvil can
# be anybody.
account_rpc_proxy = True

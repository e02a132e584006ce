"""For the host in the group `coordinators`, which carries chain, keeper, bootnode, account service
and dashboard."""

# The other hosts reach the account service here, and only there; which address that is, is the
# inventory's to say (account_host). The chain itself stays on loopback: whoever reaches anvil can
# be anybody.
account_rpc_proxy = True

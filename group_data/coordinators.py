"""For the host in the group `coordinators`: the one that carries chain, keeper, bootnode and account service."""

# The other hosts reach the account service here, and only there; which address that is, is the inventory's to say
# (account_host). The chain itself stays on loopback: whoever reaches anvil can be anybody.
account_rpc_proxy = True

"""For hosts in the group `workers`: those that train."""

# Through the account service a look at the chain costs a request over the network, and rounds last minutes.
chain_poll_seconds = 3.0

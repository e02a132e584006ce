"""The account service: signs and sends for all nodes of a fleet."""

"""The prediction market on the pages of dashboard and account service."""

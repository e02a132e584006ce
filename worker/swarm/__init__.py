"""The peer-to-peer exchange of groups."""

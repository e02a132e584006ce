"""Tailscale: login, served ports, and its ssh server."""

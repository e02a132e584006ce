"""Releases for hosts without internet."""

"""Test hosts on this machine: Debian in systemd-nspawn."""

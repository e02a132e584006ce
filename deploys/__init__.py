"""Deploys: what runs on which host, with which settings, as which units."""

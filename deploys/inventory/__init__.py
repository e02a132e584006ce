"""From an inventory's data to checked plans."""

"""Commands that are not roles, one module each."""

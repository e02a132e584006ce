"""Code that all roles and the operator's side share: files, and text of others in tables."""

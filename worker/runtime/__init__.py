"""Code that all roles and the operator's side share: files, processes, host, web service."""

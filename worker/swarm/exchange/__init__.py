"""The exchange of groups between peers."""

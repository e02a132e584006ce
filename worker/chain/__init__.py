"""The chain: JSON-RPC clients, ledger, settlement, wallet, keeper."""

"""The Vault and OpenBao backends: transit, and key-value version 2."""

"""Error answers: RFC 9457 problems, and Vault's form."""

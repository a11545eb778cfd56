"""``kms migrate``: re-encrypts ciphertexts of other systems with the service."""

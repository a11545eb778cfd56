"""``kms migrate``: ciphertexts of other systems moved into the service."""

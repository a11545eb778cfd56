"""The AWS KMS backend."""

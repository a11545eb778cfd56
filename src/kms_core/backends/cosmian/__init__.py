"""The Cosmian KMS backend."""

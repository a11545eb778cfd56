"""The age v1 format (C2SP age.md); nothing here is specific to this service."""

"""The age v1 format (C2SP age.md), with nothing of this service in it."""

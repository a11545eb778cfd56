"""The age v1 format (C2SP age.md), and the bundle stanza of this service, which ``header`` reads."""

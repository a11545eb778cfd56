"""The stanzas of the service on top of the age format."""

"""Several hosts of one install: its id, the proof that they share the spool, their clocks and settings."""

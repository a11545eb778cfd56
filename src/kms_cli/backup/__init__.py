"""Backups of an install: which files belong to one, the archive that holds them, and both commands."""

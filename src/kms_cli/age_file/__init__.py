"""Age files read and written by commands, with no service."""

"""One module for each part of the API; each offers ``router``."""

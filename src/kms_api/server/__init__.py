"""Processes, sockets and listeners of the API."""

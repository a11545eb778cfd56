"""The service on this machine: its processes, its Redis and its files."""

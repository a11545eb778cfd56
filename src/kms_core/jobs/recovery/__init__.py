"""Heartbeats of workers, and jobs whose worker died."""

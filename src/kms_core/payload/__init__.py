"""Payloads of any size: worker threads, pipes, ranges and files."""

"""Logs, metrics, traces and usage counters."""

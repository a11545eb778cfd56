"""Signed documents: small state that hosts share, changed by compare-and-set."""

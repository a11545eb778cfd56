"""Signed documents: small state that hosts share, in a file or an object, changed by compare-and-set."""

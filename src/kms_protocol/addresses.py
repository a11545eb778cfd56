"""Addresses of this machine, to which data may be sent in clear."""

import ipaddress


def is_loopback(host: str | None) -> bool:
    """Return whether a host is a loopback address or ``localhost``; other names may be of any address."""
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

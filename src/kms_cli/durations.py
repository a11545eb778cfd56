"""Spans of time as options give them: 90s, 30m, 12h, 30d."""

import re
from datetime import timedelta
from typing import Final

from kms_protocol.errors import InvalidRequest

_SPAN: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def span(label: str, text: str) -> timedelta:
    """Raises InvalidRequest, naming the option, for anything else."""
    found = _SPAN.fullmatch(text)
    if not found:
        raise InvalidRequest(f"{label} takes a number and s, m, h or d, as 12h or 30d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})

"""How the page says times, sizes and counts: filters of its templates."""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup

from kms_protocol import wire

_STEPS: Final = ((86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
_TWO: Final = 2
_KIB: Final = 1024
_CODE: Final = re.compile(r"(`+)(.+?)\1")


def when(text: str) -> str:
    """An RFC 3339 time, to the second, in UTC."""
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def ago(text: str) -> str:
    """How long before or after now that time is."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"


def span(seconds: float) -> str:
    """The largest unit of which there are two."""
    for size, name in _STEPS:
        if seconds >= _TWO * size:
            return f"{int(seconds // size)} {name}s"
    return "1 second"


def size(count: int) -> str:
    """Bytes, in binary units."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < _KIB:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= _KIB
    return f"{amount:.1f} TiB"


def number(count: int) -> str:
    return f"{count:,}"


def percent(part: float) -> str:
    """What is there but rounds to nothing is less than one."""
    return "< 1 %" if 0 < part < 0.01 else f"{part:.0%}".replace("%", " %")  # noqa: PLR2004 -- one in a hundred


def amount(progress: wire.JobProgress) -> str:
    """What of a job is done; ``page.js`` says the same while it runs."""
    if not progress.items:
        return f"{size(progress.bytes_done)} of {size(progress.bytes)}"
    failed = f", {number(progress.items_failed)} refused" if progress.items_failed else ""
    return f"{number(progress.items_done)} of {number(progress.items)} items{failed}"


def spoken(text: str) -> Markup:
    """Text whose code stands between backticks, one or two."""
    before, *found = _CODE.split(text)  # then, each time: backticks, code, text
    made = [before]
    for code, after in zip(found[1::3], found[2::3], strict=True):
        made += [Markup("<code>{}</code>").format(code), after]
    return Markup("").join(made)  # which escapes what is no markup


FILTERS: Final[Mapping[str, Callable[..., str]]] = {
    made.__name__: made for made in (when, ago, span, size, number, percent, amount, spoken)
}

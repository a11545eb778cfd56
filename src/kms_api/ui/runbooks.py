"""The runbooks: what each alert means and what to do, read from ``runbooks.md`` beside this file.

That file is Markdown of three kinds: sections, paragraphs, code. The name of an alert leads to its section.
"""

import re
from dataclasses import dataclass
from importlib import resources
from typing import Final, Literal, NamedTuple

FILE: Final = "runbooks.md"
_SECTION: Final = re.compile(r"^## (\w+)$", re.MULTILINE)
_TOKEN: Final = re.compile(r"`([^`]+)`|\b(Kms[A-Z]\w+)\b")


class TextSpan(NamedTuple):
    """A stretch of text, as it is to be shown; of a link the text is the alert that it leads to."""

    kind: Literal["text", "code", "link"]
    text: str


@dataclass(frozen=True, slots=True)
class Runbook:
    """One alert: its name, and paragraphs of pieces. ``anchor`` is how addresses name it."""

    alert: str
    paragraphs: tuple[tuple[TextSpan, ...], ...]

    @property
    def anchor(self) -> str:
        return self.alert.lower()


def load() -> tuple[Runbook, ...]:
    """All runbooks, in the order of the file."""
    return parse((resources.files(__package__ or "") / FILE).read_text("utf-8"))


def parse(text: str) -> tuple[Runbook, ...]:
    """The runbooks of such a text; what stands before the first section is for its readers there."""
    _, *parts = _SECTION.split(text)
    alerts, bodies = parts[::2], parts[1::2]
    return tuple(
        Runbook(alert, tuple(_pieces(each, alerts) for each in body.split("\n\n") if each.strip()))
        for alert, body in zip(alerts, bodies, strict=True)
    )


def _pieces(paragraph: str, alerts: list[str]) -> tuple[TextSpan, ...]:
    text, at, made = " ".join(paragraph.split()), 0, []
    for found in _TOKEN.finditer(text):
        code, alert = found.groups()
        if code or alert in alerts:
            made += [
                TextSpan("text", text[at : found.start()]),
                TextSpan("code" if code else "link", code or alert),
            ]
            at = found.end()
    return (*made, TextSpan("text", text[at:]))

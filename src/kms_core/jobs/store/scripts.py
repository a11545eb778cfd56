"""The Lua scripts of jobs: each compares and sets in one step, on the clock of Redis (``lua/*.lua``).

A script begins with ``#!lua`` (Redis 7.0 or later), so that a cluster refuses keys of other slots, and
with its cost. It is sent with the definitions of ``library.lua`` that it uses behind its first line.
``allow-oom``: it ends or frees something, or must not be held up by a Redis that is full.
"""

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Final

from kms_core.jobs.model import LeaseLost
from kms_core.jobs.spec import FEATURES, Fields
from kms_core.jobs.store.wake_ups import MOST_WAKE_UPS
from kms_protocol.errors import JobCancelled, JobExpired

_STOPS: Final = {b"lost": LeaseLost, b"cancel": JobCancelled, b"expired": JobExpired}
_BEGIN: Final = re.compile(r"^(?=local |function )", re.MULTILINE)
_NAMES: Final = re.compile(r"(?:local )?(?:function )?(\w+(?:, \w+)*)")
_WORD: Final = re.compile(r"\w+")
_COMMENT: Final = re.compile(r"--.*")


def flat(fields: Fields) -> list[str | int | float | bytes]:
    """The fields of a record as arguments of a script: names and values in turn."""
    return [part for pair in fields.items() for part in pair]


def raise_for(word: bytes) -> None:
    """Raise LeaseLost, JobCancelled or JobExpired for the word of a script that stands for it."""
    if word in _STOPS:
        raise _STOPS[word]


def used(library: str, body: str) -> str:
    """The definitions of a library that a script uses, by itself or through others.

    Redis makes them again for each call, which for the whole library takes as long as ten commands.
    A definition begins at the start of a line with ``local`` or ``function``, and uses earlier ones only.
    """
    words, kept = set(_WORD.findall(_COMMENT.sub("", body))), []
    for definition in reversed(_BEGIN.split(library)[1:]):
        found = _NAMES.match(definition)
        if found and not words.isdisjoint(found[1].split(", ")):
            words.update(_WORD.findall(_COMMENT.sub("", definition)))
            kept.append(definition)
    return "".join(reversed(kept))


def _read() -> Iterator[tuple[str, str]]:
    folder = files(__package__) / "lua"
    known = ", ".join(f'["{name}"] = true' for name in sorted(FEATURES))
    library = (folder / "library.lua").read_text("utf-8")
    library = library.replace("@KNOWN@", known).replace("@MOST_WAKE_UPS@", str(MOST_WAKE_UPS))
    for file in folder.iterdir():
        if file.name.endswith(".lua") and file.name != "library.lua":
            shebang, _, body = file.read_text("utf-8").partition("\n")
            yield file.name.removesuffix(".lua"), f"{shebang}\n{used(library, body)}\n{body}"


SCRIPTS: Final = dict(_read())
"""Name to text."""

"""Stanzas over stdin and stdout, as an age tool and its plugin exchange them; knows no command's meaning.

Source: C2SP age-plugin specification, "IPC protocol". The text is that of stanzas in an age header.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from kms_core.age.header import HeaderLimits, Stanza, parse_stanzas, render_stanza
from kms_protocol.errors import DecryptFailed, TooLarge

LINE_BYTES: Final = 256 * 1024  # a recipient, or the filler of a large file's header
STANZA: Final = HeaderLimits(header_bytes=1024 * 1024, stanzas=1)
PHASE_STANZAS: Final = 20_000
PHASE_BYTES: Final = 16 * 1024 * 1024
_COLUMNS: Final = 64
_ONE_WORD: Final = re.compile(r"[!-~]+")


class Broken(Exception):
    """The other side does not speak the protocol, or has gone: nothing more can be said to it."""


class PluginConnection:
    """Both directions of the conversation."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    def phase(self) -> Iterator[Stanza]:
        """The commands of a phase of the other side's, up to its ``done``."""
        left = PHASE_BYTES
        for _ in range(PHASE_STANZAS):
            stanza, size = self._read()
            if stanza.args == ("done",):
                return
            left -= size
            if left < 0:
                break
            yield stanza
        raise Broken("too much was said before done")

    def ask(self, command: str, *args: str, body: bytes = b"") -> str:
        """Say one command of a phase of ours; the type of the answer: ok, fail or unsupported."""
        self._write(Stanza((command, *args), body))
        answer, _ = self._read()
        return answer.type

    def done(self) -> None:
        """End a phase of ours."""
        self._write(Stanza(("done",), b""))

    def _write(self, stanza: Stanza) -> None:
        if not all(map(_ONE_WORD.fullmatch, stanza.args)):
            raise ValueError("an argument of a stanza is one word of printable ASCII")
        try:
            self._outgoing.write(render_stanza(stanza))
            self._outgoing.flush()
        except OSError as exc:
            raise Broken("the age tool has gone") from exc

    def _read(self) -> tuple[Stanza, int]:
        """One stanza, and its size in bytes. Its last line is the first below 64 columns."""
        text = self._read_line()
        while True:
            line = self._read_line()
            text += line
            if len(line) <= _COLUMNS:
                break
            if len(text) > STANZA.header_bytes:
                raise Broken("a stanza is too long")
        try:
            return parse_stanzas(text, STANZA)[0], len(text)
        except (DecryptFailed, TooLarge) as exc:
            raise Broken("that is no stanza") from exc

    def _read_line(self) -> bytes:
        line = self._incoming.readline(LINE_BYTES)
        if not line.endswith(b"\n"):
            raise Broken("the age tool has gone" if len(line) < LINE_BYTES else "a line is too long")
        return line

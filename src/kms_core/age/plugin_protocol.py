"""Stanzas that age tools and plugins exchange on stdin and stdout.

Source: C2SP age-plugin specification, "IPC protocol". ``plugin_identity`` is on the side of the age tool,
``kms_cli.plugin`` on that of the plugin.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from kms_core.age.header import HeaderLimits, Stanza, parse_stanzas, render_stanza
from kms_protocol.errors import DecryptFailed, TooLarge

LINE_BYTES: Final = 256 * 1024  # a recipient, or the padding of a large header
STANZA: Final = HeaderLimits(header_bytes=1024 * 1024, stanzas=1)
PHASE_STANZAS: Final = 20_000
PHASE_BYTES: Final = 16 * 1024 * 1024
_COLUMNS: Final = 64
_ONE_WORD: Final = re.compile(r"[!-~]+")


class Broken(Exception):
    """The other program violates the protocol or has exited. The conversation cannot go on."""


class PluginConnection:
    """The connection to another program, ``peer`` in errors: stanzas in both directions."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO, peer: str = "the age tool") -> None:
        self._incoming, self._outgoing, self._peer = incoming, outgoing, peer

    def phase(self) -> Iterator[Stanza]:
        """Yield the commands of a phase of the other program, up to its ``done``."""
        left = PHASE_BYTES
        for _ in range(PHASE_STANZAS):
            stanza, size = self._read()
            if stanza.args == ("done",):
                return
            left -= size
            if left < 0:
                break
            yield stanza
        raise Broken("too many commands before done")

    def send(self, *args: str, body: bytes = b"") -> None:
        """Send a command, an answer, or ``done``, which ends this program's phase.

        Raises ValueError for an argument that is not one word of ASCII.
        """
        if not all(map(_ONE_WORD.fullmatch, args)):
            raise ValueError("an argument of a stanza is one word of printable ASCII")
        try:
            self._outgoing.write(render_stanza(Stanza(args, body)))
            self._outgoing.flush()
        except OSError as exc:
            raise Broken(f"{self._peer} has exited") from exc

    def ask(self, command: str, *args: str, body: bytes = b"") -> str:
        """Send a command. Return the type of the answer: ok, fail or unsupported."""
        self.send(command, *args, body=body)
        answer, _ = self._read()
        return answer.type

    def _read(self) -> tuple[Stanza, int]:
        """Read a stanza and its size in bytes. Its last line is the first one below 64 columns."""
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
            raise Broken("a stanza is malformed") from exc

    def _read_line(self) -> bytes:
        line = self._incoming.readline(LINE_BYTES)
        if not line.endswith(b"\n"):
            raise Broken(f"{self._peer} has exited" if len(line) < LINE_BYTES else "a line is too long")
        return line

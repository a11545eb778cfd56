"""Identities that an age plugin holds, such as a key of a TPM or a YubiKey (``AGE-PLUGIN-NAME-1…``).

Source: C2SP age-plugin specification, its state machines ``identity-v1`` and ``recipient-v1``, on the side of
the age tool. No user is asked: a plugin that wants a PIN or a confirmation gets ``fail``.
"""

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, Final, cast

from kms_core.age import bech32
from kms_core.age.header import FILE_KEY_BYTES, Stanza
from kms_core.age.plugin_protocol import Broken, PluginConnection
from kms_core.age.x25519 import NoMatch
from kms_protocol.errors import BackendUnavailable

PREFIX: Final = "AGE-PLUGIN-"
TIMEOUT_S: Final = 30.0
_NAME: Final = re.compile(r"[a-z0-9+._-]+")
_PASSED: Final = ("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR")
_SHOWN_CHARS: Final = 200
_BY_HAND: Final = "try it by hand: age -d -i IDENTITY_FILE SEALED_FILE"


@dataclass(slots=True)
class _PluginAnswer:
    """The answer of a plugin. ``asked``: it wanted a PIN or a confirmation."""

    file_key: bytes = field(default=b"", repr=False)
    stanzas: list[Stanza] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    asked: bool = False


@dataclass(frozen=True, slots=True)
class PluginIdentity:
    """An identity of the program ``age-plugin-<name>``, which is found on the PATH."""

    name: str
    text: str = field(repr=False)
    timeout_s: float = TIMEOUT_S

    @classmethod
    def parse(cls, text: str) -> "PluginIdentity":
        """Parse an identity. Raises ValueError, without the text, for any other."""
        prefix, _ = bech32.decode(text)
        name = prefix.upper().removeprefix(PREFIX).removesuffix("-").lower()
        if not text.startswith(PREFIX) or not prefix.endswith("-") or not _NAME.fullmatch(name):
            raise ValueError("not the identity of an age plugin")
        return cls(name, text)

    def unwrap_first(self, stanzas: Sequence[Stanza]) -> bytes:
        """The file key of a file with these stanzas, 16 bytes.

        Raises NoMatch if none of them is for this identity, BackendUnavailable if the plugin is missing,
        hangs for ``timeout_s`` seconds, asks for a PIN, reports an error or breaks the protocol.
        """
        found = _PluginAnswer()
        with self._running("identity-v1") as connection:
            connection.send("add-identity", self.text)
            for stanza in stanzas:
                connection.send("recipient-stanza", "0", *stanza.args, body=stanza.body)
            connection.send("done")
            self._receive(connection, found)
        if len(found.file_key) == FILE_KEY_BYTES:
            return found.file_key
        self._raise_refused(found)
        raise NoMatch

    def wrap(self, file_key: bytes) -> list[Stanza]:
        """The stanzas that wrap a file key for this identity. Raises BackendUnavailable."""
        made = _PluginAnswer()
        with self._running("recipient-v1") as connection:
            connection.send("add-identity", self.text)
            connection.send("wrap-file-key", body=file_key)
            connection.send("done")
            self._receive(connection, made)
        if not made.stanzas or made.errors:
            self._raise_refused(made)
            raise BackendUnavailable(f"age-plugin-{self.name} sealed nothing: {_BY_HAND}")
        return made.stanzas

    @staticmethod
    def _receive(connection: PluginConnection, received: _PluginAnswer) -> None:
        """Answer each command of the plugin's phase."""
        for stanza in connection.phase():
            answer = "ok"
            match stanza.args:
                case ("file-key", _):
                    received.file_key = stanza.body
                case ("recipient-stanza", _, *args) if args:
                    received.stanzas.append(Stanza(tuple(args), stanza.body))
                case ("error", *_):
                    received.errors.append(stanza.body.decode("utf-8", "replace"))
                case ("request-secret" | "request-public" | "confirm", *_):
                    received.asked, answer = True, "fail"
                case ("msg" | "labels", *_):
                    pass
                case _:  # grease, and commands of later versions
                    answer = "unsupported"
            connection.send(answer)

    def _raise_refused(self, found: _PluginAnswer) -> None:
        """Raise BackendUnavailable if the plugin asked for something or reported an error."""
        if found.asked:
            raise BackendUnavailable(
                f"age-plugin-{self.name} asks for a PIN or a confirmation, which a service cannot give: "
                "use an identity that needs none"
            )
        if found.errors:
            shown = "".join(char if char.isprintable() else " " for char in found.errors[0])[:_SHOWN_CHARS]
            raise BackendUnavailable(f"age-plugin-{self.name} reports: {shown}")

    @contextmanager
    def _running(self, machine: str) -> Iterator[PluginConnection]:
        """The connection to a plugin that is killed at the end, or after ``timeout_s`` seconds."""
        program = shutil.which(f"age-plugin-{self.name}")
        if program is None:
            raise BackendUnavailable(
                f"age-plugin-{self.name} is not on the PATH of the service: install it, or set PATH"
            )
        try:
            process = subprocess.Popen(
                [program, f"--age-plugin={machine}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _PASSED if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            raise BackendUnavailable(f"{program} cannot be started: {exc.strerror}") from exc
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(self.timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield PluginConnection(cast("BinaryIO", process.stdout), cast("BinaryIO", process.stdin), "it")
        except Broken as exc:
            how = f"gave no answer for {self.timeout_s:g} s" if late.is_set() else f"failed ({exc})"
            raise BackendUnavailable(f"age-plugin-{self.name} {how}: {_BY_HAND}") from exc
        finally:
            timer.cancel()
            timer.join()
            _kill(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    cast("BinaryIO", pipe).close()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a plugin and what it started. Call it before ``wait``: after that, its id may be another's."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

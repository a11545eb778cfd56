"""``age-plugin-kmstest``: a plugin for tests and for stock age; some identities misbehave on purpose.

Run as a program it speaks C2SP age-plugin. It shares no code of the protocol with the service. An identity
holds a mode and a symmetric key; a recipient holds the same, which is enough for tests.
"""

import base64
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age import bech32

NAME: Final = "kmstest"
MODES: Final = ("good", "pin", "hangs", "dies", "error", "garbage", "confirm", "other-key", "talks")
PIN: Final = b"123456"
_NONCE: Final = bytes(12)


def identity(mode: str = "good", key: bytes = bytes(32)) -> str:
    """An identity of the plugin."""
    return bech32.encode(f"AGE-PLUGIN-{NAME.upper()}-", bytes([MODES.index(mode)]) + key)


def recipient(mode: str = "good", key: bytes = bytes(32)) -> str:
    """The recipient of ``identity``."""
    return bech32.encode(f"age1{NAME}", bytes([MODES.index(mode)]) + key)


def install(folder: Path) -> Path:
    """A directory for the PATH that holds the plugin."""
    folder.mkdir(exist_ok=True)
    script = folder / f"age-plugin-{NAME}"
    here, argv = shlex.quote(str(Path(__file__).parents[1])), shlex.join([sys.executable, "-P", __file__])
    script.write_text(f'#!/bin/sh\nPYTHONPATH={here} exec {argv} "$@"\n', "utf-8")
    script.chmod(0o755)
    return folder


# -- the program -------------------------------------------------------------------------------------


def _b64(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def _read() -> tuple[list[str], bytes]:
    words = sys.stdin.buffer.readline().decode().rstrip("\n").split(" ")
    if words[0] != "->":
        sys.exit(1)
    text = b""
    while True:
        line = sys.stdin.buffer.readline().rstrip(b"\n")
        text += line
        if len(line) < 64:
            return words[1:], base64.b64decode(text + b"=" * (-len(text) % 4))


def _send(*words: str, body: bytes = b"") -> None:
    text = _b64(body)
    rows = [text[at : at + 64] for at in range(0, len(text) + 1, 64)]
    sys.stdout.buffer.write(f"-> {' '.join(words)}\n".encode() + b"\n".join(rows) + b"\n")
    sys.stdout.buffer.flush()


def _ask(*words: str, body: bytes = b"") -> tuple[str, bytes]:
    _send(*words, body=body)
    answer, text = _read()
    return answer[0], text


def _commands() -> list[tuple[list[str], bytes]]:
    found: list[tuple[list[str], bytes]] = []
    while True:
        words, body = _read()
        if words == ["done"]:
            return found
        found.append((words, body))


def _keys(commands: list[tuple[list[str], bytes]]) -> list[tuple[str, bytes]]:
    given = [words[1] for words, _ in commands if words[0] in {"add-identity", "add-recipient"}]
    data = [bech32.decode(text)[1] for text in given]
    return [(MODES[each[0]], each[1:]) for each in data]


def _ends_badly(mode: str) -> None:
    """Hang, die or break the protocol, if the mode says so."""
    if mode == "hangs":
        time.sleep(600)
    if mode in {"dies", "garbage"}:
        sys.stdout.buffer.write(b"-> file-key 0\nAAAA" if mode == "dies" else b"no stanza at all\n\n")
        sys.stdout.buffer.flush()
        os._exit(3)


def _refuses(mode: str) -> bool:
    """Ask or report what the mode says; True if no key is given."""
    if mode == "error":
        _ask("error", "internal", body=b"the token was removed\x1b[31m")
        return True
    if mode == "pin" and _ask("request-secret", body=b"PIN of the token") != ("ok", PIN):
        _ask("error", "internal", body=b"no PIN, no key")
        return True
    if mode == "confirm":
        return _ask("confirm", base64.b64encode(b"yes").decode().rstrip("="), body=b"touched?")[0] != "ok"
    if mode == "talks":
        _ask("msg", body=b"touch the token")
        _ask("grease-command", "1", body=b"")
    return False


def _unwrap() -> None:
    commands = _commands()
    for mode, key in _keys(commands):
        _ends_badly(mode)
        if _refuses(mode):
            break
        for words, body in commands:
            if words[0] != "recipient-stanza" or words[2] != NAME:
                continue
            try:
                file_key = ChaCha20Poly1305(key).decrypt(_NONCE, body, None)
            except InvalidTag:
                continue
            if mode == "other-key":
                file_key = bytes(16)
            _ask("file-key", words[1], body=file_key)
            _send("done")
            return
    _send("done")


def _wrap() -> None:
    commands = _commands()
    for mode, key in _keys(commands):
        _ends_badly(mode)
        if _refuses(mode):
            break
        for words, body in commands:
            if words[0] == "wrap-file-key":
                _ask("recipient-stanza", "0", NAME, body=ChaCha20Poly1305(key).encrypt(_NONCE, body, None))
    _send("done")


if __name__ == "__main__":
    _unwrap() if sys.argv[1:] == ["--age-plugin=identity-v1"] else _wrap()

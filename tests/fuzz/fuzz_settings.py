"""A settings file and an environment: they become settings, or one error that names no value.

An input is the file and, behind two zero bytes, lines ``NAME=value`` of the environment.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kms_core.settings.load import load as load_settings
from kms_protocol.errors import ConfigurationError
from support.fuzz.harness import SEPARATOR, parts

MOST_BYTES: Final = 2 * 1024
CANARY: Final = "cAnArY"
WORDS: Final = (
    b"[kms]\n",
    b"[kms.keys]\n",
    b"[kms.auth]\n",
    b"[kms.auth.issuers.corp]\n",
    b"[kms.redis]\n",
    b"[kms.jobs]\n",
    b"[kms.server]\n",
    b"[kms.environments.qa]\n",
    b"[[kms",
    b"a.b.c = ",
    b'"""',
    b"${HOME}",
    b"${X:-y}",
    b"$${",
    b"1979-05-27T07:32:00Z",
    b"inf",
    b"[" * 64,
    b"9" * 40,
    b"KMS_PORT=tcp://10.0.0.1:8082",
    b"\nKMS_BIND=",
    b'"transit://vault:8200/transit/keys/x?token-file=/t"',
    CANARY.encode(),
)
_folder: Final = tempfile.TemporaryDirectory(prefix="kms-fuzz-")
_FILE: Final = Path(_folder.name, "kms.toml")
_EXAMPLE: Final = Path(__file__).parents[2] / "docs/kms.example.toml"


def seeds() -> Iterable[bytes]:
    yield b""
    yield b"[kms]\nenvironment = 'prod'\nport = 8082\n"
    yield b"[kms]\nenvironment = '${X}'\n" + SEPARATOR + b"X=dev\nKMS_PORT=8082\nKMS_BIND=::1"
    yield b"[kms.keys]\npayroll = 'transit://vault:8200/transit/keys/payroll?token-file=/t'\n"
    yield b"[kms]\nredis.url = 'redis://u:cAnArY@h:1/0'\nx = 'cAnArY'\n" + SEPARATOR + b"KMS_PORT=cAnArY"
    yield b"[kms]\n" + SEPARATOR + b"KMS_PORT=tcp://10.0.0.1:8082\nKMS_PORT_8082_TCP_ADDR=10.0.0.1"
    yield b"[kms]\na = " + b"[" * 1500
    yield b"[kms]\na = " + b"{a=" * 700
    yield b"[kms]\nport = " + b"9" * 5000
    yield b"[kms]\nport = 0x" + b"f" * 500
    yield b"[" + b"a." * 1000 + b"b]"
    example = _EXAMPLE.read_bytes()
    sections = example.split(b"\n[")
    for number, section in enumerate(sections):
        yield (b"[" if number else b"") + section[: MOST_BYTES - 64] + b"\n"


def check(data: bytes) -> None:
    text, lines = parts(data, 2)
    _FILE.write_bytes(text)
    environ = {"HOME": "/home/nobody", "KMS_STATE_DIR": str(_folder.name)}
    for line in lines.decode("utf-8", "surrogateescape").split("\n"):
        name, equals, value = line.partition("=")
        if equals:
            environ[name] = value
    environ.pop("KMS_CONFIG", None)
    try:
        loaded = load_settings(_FILE, environ)
    except ConfigurationError as exc:
        assert exc.detail
        assert len(exc.detail) < 4 * MOST_BYTES
        return
    again = load_settings(_FILE, environ)
    assert again == loaded
    assert CANARY not in repr(loaded.kms.redis)

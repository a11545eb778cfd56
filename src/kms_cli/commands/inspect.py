"""``kms inspect``: the header of an encrypted file, read without a key and not verified."""

import io
from pathlib import Path
from typing import Final

import click

from kms_cli import terminal
from kms_cli.age_file import codec, streams
from kms_cli.options import FILE
from kms_cli.session import session
from kms_core.age import mlkem768x25519, stream, x25519
from kms_core.age.header import Header, Stanza
from kms_core.backends.wrap_keys import name_of
from kms_core.envelope import binding
from kms_protocol.errors import DecryptFailed

NATIVE: Final = frozenset({x25519.STANZA_TYPE, mlkem768x25519.STANZA_TYPE})
READ_BYTES: Final = 1024 * 1024


@click.command("inspect")
@click.argument("file", type=FILE)
def inspect_command(file: Path) -> None:
    """Show key, backend, stanzas and sizes of an encrypted FILE. No key is used and nothing is verified."""
    terminal.record(inspect(file), as_json=session().as_json)


def inspect(path: Path) -> dict[str, object]:
    """Return named values in display order.

    Raises NotACiphertext, TooLarge for a header above 256 KiB, DecryptFailed for a malformed header.
    """
    with streams.source(path) as opened:
        try:
            sealed = codec.read(opened)
            bound = binding.read(sealed.head)
        except DecryptFailed as exc:
            raise DecryptFailed(f"The header of {path} is damaged") from exc
        payload_bytes = sealed.file_range.size if sealed.file_range else _size_bytes(sealed.payload)
    head = sealed.head
    shared = ", ".join(name_of(wrap.job) for wrap in bound.wraps if wrap.job) if bound else ""
    named = {"key_id": bound.key_id, "key_version": bound.key_version} if bound else {}
    return {
        "format": "age v1" if sealed.file_range else "age v1, armored",
        "made_by": "kms-service" if bound else "another age tool",
        "file_id": binding.file_id(head.nonce),
        **named,
        "backend": _backend(head),
        **({"wrap_key": shared} if shared else {}),
        "context": "bound" if bound else "none",
        "origin": "claimed" if bound and bound.origin else "none",
        "stanzas": ", ".join(map(_shown, head.stanzas)),
        "header_bytes": head.size,
        "payload_bytes": payload_bytes,
        "plaintext_bytes": _plaintext_bytes(payload_bytes),
    }


def _plaintext_bytes(payload_bytes: int) -> object:
    try:
        return stream.plaintext_size(payload_bytes)
    except DecryptFailed:
        return "impossible: the file is truncated"


def _backend(head: Header) -> str:
    wraps = {stanza.args[1] for stanza in head.stanzas if stanza.type == binding.WRAP and stanza.args[1:]}
    native = {"age" for stanza in head.stanzas if stanza.type in NATIVE}
    return ", ".join(sorted(wraps | native)) or "unknown"


def _shown(stanza: Stanza) -> str:
    return " ".join(stanza.args[:4]) if stanza.type == binding.WRAP else stanza.type


def _size_bytes(source: io.RawIOBase) -> int:
    size_bytes = 0
    while part := source.read(READ_BYTES):
        size_bytes += len(part)
    return size_bytes

"""Whole age files for an identity that we know: only what was sealed opens, and as what it was sealed.

The first byte says who made the file. Even: somebody without any key, who may do what he likes to one of
ours. Odd: somebody who learned the file key of one, and so can write another header under a MAC that fits.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fuzz.fuzz_header import WORDS as WORDS_OF_HEADERS
from fuzz.fuzz_header import written
from kms_core.age import header, x25519
from kms_core.age.header import SYNC_LIMITS
from kms_core.envelope import binding
from kms_core.operation import Opened
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, ForeignRefused, KmsError, NotACiphertext, TooLarge, UnknownKey
from support.age_kms import ADA, MemoryTrail, age_backend, kms_over
from support.fuzz.harness import CORPUS

MOST_BYTES: Final = 4 * 1024
WORDS: Final = (*WORDS_OF_HEADERS, b"default", b"other")
IDENTITY: Final = x25519.X25519Identity(bytes(range(32)))
CONTEXT: Final = Context.parse("env=prod,row=7")
PLAINTEXT: Final = b"what was sealed"
_REFUSALS: Final = (DecryptFailed, ForeignRefused, NotACiphertext, TooLarge, UnknownKey)
_OURS: Final = tuple(path.read_bytes() for path in sorted((CORPUS / "envelope").glob("ours-*")))
"""Files that ``Kms.encrypt`` made for this identity, key id and context."""

_HEADS: Final = tuple(header.parse(file, SYNC_LIMITS) for file in _OURS)
_FILE_KEYS: Final = tuple(IDENTITY.unwrap(head.stanzas[0]) for head in _HEADS)
_folder: Final = tempfile.TemporaryDirectory(prefix="kms-fuzz-")
_KMS: Final = kms_over(
    age_backend(Path(_folder.name), IDENTITY), accept_foreign=False, trail=(_trail := MemoryTrail())
)
_FOREIGN: Final = kms_over(age_backend(Path(_folder.name), IDENTITY), trail=_trail)


def seeds() -> Iterable[bytes]:
    for file in _OURS:
        yield b"\x00" + file
        yield b"\x01" + file


def check(data: bytes) -> None:
    _trail.lines.clear()
    if data[:1] and data[0] & 1:
        _by_a_reader(data[1:])
    else:
        _by_a_stranger(data[1:])


def _by_a_stranger(file: bytes) -> None:
    """One file of ours, and not one bit of it changed; or one that stock age could have made."""
    opened = _opened(file)
    if opened:
        assert file in _OURS
        assert (opened.plaintext, opened.origin) == (PLAINTEXT, "service")
    try:
        foreign = _FOREIGN.decrypt(ADA, file, CONTEXT)
    except KmsError as exc:
        assert isinstance(exc, _REFUSALS)
        return
    assert opened or foreign.origin == "foreign"


def _by_a_reader(file: bytes) -> None:
    """The file key lets nobody move a file to another context, key or version."""
    try:
        head = header.parse(file, SYNC_LIMITS)
    except KmsError:
        return
    for ours, model, file_key in zip(_OURS, _HEADS, _FILE_KEYS, strict=True):
        made = header.render(head.stanzas, file_key) + ours[model.size :]
        opened = _opened(made)
        if opened is None:
            continue
        bound, was = binding.read(header.parse(made, SYNC_LIMITS).stanzas), binding.read(model.stanzas)
        assert bound is not None
        assert was is not None
        assert (bound.key_id, bound.key_version) == (was.key_id, was.key_version)
        assert bound.origin == was.origin
        assert opened.plaintext == PLAINTEXT
        assert written(header.parse(made, SYNC_LIMITS)) == made[: -len(ours) + model.size]


def _opened(file: bytes) -> Opened | None:
    """What a service that takes no foreign files makes of it; any other context opens nothing."""
    for other in (Context(), Context.parse("env=prod,row=8")):
        try:
            _KMS.decrypt(ADA, file, other)
        except KmsError as exc:
            assert isinstance(exc, _REFUSALS)
        else:
            raise AssertionError("opened under another context")
    try:
        opened = _KMS.decrypt(ADA, file, CONTEXT)
    except KmsError as exc:
        assert isinstance(exc, _REFUSALS)
        opened = None
    results = {str(line["result"]) for line in _trail.lines}
    assert results <= {kind.code for kind in _REFUSALS} | {"ok"}
    assert len(_trail.lines) % 3 == 0
    return opened

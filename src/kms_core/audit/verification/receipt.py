"""A receipt: one line, and the proof that it stands before a signed checkpoint. Shows no other line.

The proof holds the head before the line and the digests of the lines up to the checkpoint. Whoever has the
public key checks it without the trail and without the service.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_protocol.errors import AuditUnavailable, BadInput

VERSION: Final = 1
_MOST_LINES: Final = 1_000_000
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``before`` and ``path`` are in hex; ``line`` and ``checkpoint`` as they stand in the file."""

    version: int
    id: str
    line: str
    before: str
    path: list[str]
    checkpoint: str


class UnknownRecord(BadInput):
    """No record of this id here."""

    code = "unknown_record"
    summary = "No record of this id is in this folder"


class BadReceipt(BadInput):
    """The receipt does not prove what it says."""

    code = "bad_receipt"
    summary = "The receipt does not hold"


def make(folder: Path, audit_id: str) -> Receipt:
    """The receipt of a record. Raises UnknownRecord, OSError, AuditUnavailable if no checkpoint follows."""
    name, _, number = audit_id.rpartition(":")
    if not (segments.CHAIN.fullmatch(name) and _NUMBER.fullmatch(number)):
        raise UnknownRecord("An audit id is a chain, a colon and a number, as X-KMS-Audit-Id says it")
    lines = _lines_from(folder, name, int(number) - 1)
    before = chain.claimed_head(next(lines, b""))
    line = next(lines, b"")
    found = chain.read(line)
    if found is None or before is None or found.seq != int(number):
        raise UnknownRecord
    path, checkpoint = _to_checkpoint(lines)
    return Receipt(
        version=VERSION,
        id=audit_id,
        line=_text(line),
        before=before.hex(),
        path=path,
        checkpoint=_text(checkpoint),
    )


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:  # no line of ours; its fields that nobody reads were not looked at
        raise UnknownRecord from None


def _to_checkpoint(lines: Iterator[bytes]) -> tuple[list[str], bytes]:
    """The digests of the lines up to the next signed one, and that one."""
    path: list[str] = []
    for line in lines:
        found = chain.read(line)
        if found is not None and found.kind in chain.SIGNED:
            return path, line
        path.append(chain.digest(chain.body_of(line)).hex())
    raise AuditUnavailable("No checkpoint follows this record yet: ask again in some seconds")


def check(receipt: Receipt, keys: PublicKeys) -> ChainLine:
    """The record, if the receipt proves that a key of ``keys`` has vouched for it. Raises BadReceipt."""
    line, checkpoint = receipt.line.encode(), receipt.checkpoint.encode()
    found, signed = chain.read(line), keys.signed(checkpoint)
    if receipt.version != VERSION or found is None:
        raise BadReceipt("This is no receipt of version 1")
    if signed is None:
        raise BadReceipt("The checkpoint is not signed by a key that is trusted here")
    try:
        before, path = bytes.fromhex(receipt.before), [bytes.fromhex(each) for each in receipt.path]
    except ValueError:
        raise BadReceipt("The path is not made of digests") from None
    if receipt.id != f"{found.chain}:{found.seq}" or not chain.is_sound(before, line):
        raise BadReceipt("The line is not the one that the receipt is for, or was changed")
    reached = chain.follow(bytes.fromhex(found.head), path)
    place = found.chain, found.seq + len(path) + 1, reached.hex()
    if place != (signed.chain, signed.seq, signed.previous):
        raise BadReceipt("The path does not lead from the line to the checkpoint")
    return found


def _lines_from(folder: Path, name: str, seq: int) -> Iterator[bytes]:
    """The whole lines of a chain from a number on, through its files."""
    for segment in segments.by_chain(folder).get(name, ()):
        with segment.path.open("rb") as file:
            file.seek(segments.offset_of(file, lambda line: line.seq >= seq))
            yield from (line[:-1] for line in islice(file, _MOST_LINES) if line.endswith(b"\n"))

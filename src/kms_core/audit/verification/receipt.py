"""Receipts: one line of the log, with the proof that a signed checkpoint follows it. Shows no other line.

The proof has the head before the line and the digests of the lines up to the checkpoint. The public key is
enough to check it; neither the log nor the service is needed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_protocol.errors import AuditUnavailable, BadInput

VERSION: Final = 1
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``before`` and ``path`` are in hex; ``line`` and ``checkpoint`` as in the segment."""

    version: int
    id: str
    line: str
    before: str
    path: list[str]
    checkpoint: str


class UnknownRecord(BadInput):
    """The folder has no record of this id."""

    code = "unknown_record"
    summary = "No record of this id is in this folder"


class BadReceipt(BadInput):
    """The receipt does not prove its line."""

    code = "bad_receipt"
    summary = "The receipt does not hold"


def make(folder: Path, audit_id: str) -> Receipt:
    """Make the receipt of a record. Raises UnknownRecord, OSError; AuditUnavailable before a checkpoint."""
    name, _, number = audit_id.rpartition(":")
    if not (segments.CHAIN.fullmatch(name) and _NUMBER.fullmatch(number)):
        raise UnknownRecord("An audit id is a chain, a colon and a number, as in X-KMS-Audit-Id")
    lines = _lines_from(folder, name, int(number) - 1)
    before, line = chain.claimed_head(next(lines, b"")), next(lines, b"")
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
    except UnicodeDecodeError:  # not written by the service
        raise UnknownRecord from None


def _to_checkpoint(lines: Iterator[bytes]) -> tuple[list[str], bytes]:
    """The digests of the lines up to the next signed line, and that line."""
    path: list[str] = []
    for line in lines:
        found = chain.read(line) if chain.SIGNATURE in line else None
        if found is not None and found.kind in chain.SIGNED:
            return path, line
        path.append(chain.digest(chain.body_of(line)).hex())
    raise AuditUnavailable("No checkpoint follows this record yet: ask again in some seconds")


def check(receipt: Receipt, keys: PublicKeys) -> ChainLine:
    """The record, if the receipt proves it by a checkpoint that one of ``keys`` signed. Raises BadReceipt."""
    line, checkpoint = receipt.line.encode(), receipt.checkpoint.encode()
    found, signed = chain.read(line), keys.signed(checkpoint)
    if receipt.version != VERSION or found is None:
        raise BadReceipt("This is not a receipt of version 1")
    if signed is None:
        raise BadReceipt("The checkpoint is not signed by a key that is trusted here")
    try:
        before, path = bytes.fromhex(receipt.before), [bytes.fromhex(each) for each in receipt.path]
    except ValueError:
        raise BadReceipt("The path does not consist of digests") from None
    if receipt.id != f"{found.chain}:{found.seq}" or not chain.is_sound(before, line):
        raise BadReceipt("The line is not that of the receipt's id, or was changed")
    reached = chain.follow(bytes.fromhex(found.head), path)
    if (found.chain, found.seq + len(path) + 1, reached.hex()) != (signed.chain, signed.seq, signed.previous):
        raise BadReceipt("The path does not lead from the line to the checkpoint")
    return found


def _lines_from(folder: Path, name: str, seq: int) -> Iterator[bytes]:
    """The lines of a chain from a number on."""
    for segment in segments.by_chain(folder).get(name, ()):
        begin = segments.offset_of(segment.path, lambda line: line.seq >= seq)
        yield from segments.lines_of(segment.path, begin)

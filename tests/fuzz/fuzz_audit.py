"""Audit trails that somebody else wrote: readers read them, and verification passes nothing but the genuine.

The first byte says what an input is: the lines of a file; such lines, whose heads are made to fit first, as
whoever has no signing key could do; or a receipt.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from kms_core.audit import chain, query, segments
from kms_core.audit.hosts import HostLog
from kms_core.audit.keys import PublicKeys
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import BadReceipt, Receipt
from kms_core.audit.verification.verify import verify
from kms_protocol.errors import KmsError
from support.fuzz.harness import CORPUS

MOST_BYTES: Final = 8 * 1024
_KEPT: Final = CORPUS / "audit"
GENUINE: Final = (_KEPT / "genuine.jsonl").read_bytes()
KEYS: Final = PublicKeys.read(_KEPT / "genuine.pub")
NAME: Final = json.loads(GENUINE.splitlines()[0])["chain"]
WORDS: Final = (
    b',"head":"',
    b',"signature":"',
    b'"kind":"open"',
    b'"kind":"closed"',
    b'"kind":"checkpoint"',
    b'"kind":"retired"',
    b'"heads":{"' + NAME.encode() + b'":[1,"00","2026"]}',
    b'"previous":"zz"',
    b'"previous":""',
    b'"public_key":"',
    b'"stage":"intent"',
    b'"clock":"2026"',
    b'{"seq":0,',
    b'"seq":-1',
    b'"seq":99999999999999999999',
    b'"chain":"../x"',
    b'"segment":-1',
    b"[" * 64,
)
_folder: Final = tempfile.TemporaryDirectory(prefix="kms-fuzz-")
_PLACE: Final = Path(_folder.name)
_MADE_TO_FIT: Final = 1
_A_RECEIPT: Final = 2
_FILE: Final = segments.path_of(_PLACE, NAME, 1)


def seeds() -> Iterable[bytes]:
    for first in (b"\x00", b"\x01"):
        yield first + GENUINE
        yield first + b"".join(GENUINE.splitlines(keepends=True)[:-1])
        yield first + b'{"a":' + b"[" * 3000 + b"\n" + GENUINE
        yield first + GENUINE.replace(b'"seq":0', b'"seq":' + b"9" * 5000, 1)
        yield first + GENUINE.replace(
            b'"context":{', b'"x":' + b"[" * 1500 + b"]" * 1500 + b',"context":{', 1
        )
    for number in (1, 2, 4):
        yield b"\x02" + _receipt(number)


def check(data: bytes) -> None:
    way, lines = (data[:1] or b"\x00")[0] % 3, data[1:]
    if way == _A_RECEIPT:
        _proves(lines)
        return
    if way == _MADE_TO_FIT:
        lines = _fitting(lines)
    _FILE.write_bytes(lines)
    for keys in (KEYS, None):
        report = verify(_PLACE, keys)
        assert report.verdict in {"intact", "open end", "damaged"}
        if keys and report.verdict == "intact" and report.lines:
            assert lines == GENUINE, "a trail that nobody signed is called intact"
    _read()


def _fitting(lines: bytes) -> bytes:
    """The same bodies, each under the head that follows from those before it."""
    head, made = chain.ZERO, []
    for line in lines.splitlines(keepends=True):
        if chain.claimed_head(line[:-1]) is None:
            made.append(line)
            continue
        sealed, head = chain.seal(head, chain.body_of(line[:-1]))
        made.append(sealed)
    return b"".join(made)


def _read() -> None:
    """What the API and the command do with the files of a trail; no line of them is trusted."""
    wanted = query.EventFilter()
    newest = query.newest([HostLog("", _PLACE)], wanted, 10)
    page = query.page([HostLog("", _PLACE)], wanted, None, 5)
    assert len(page.events) <= 5
    query.page([HostLog("", _PLACE)], wanted, page.following, 5)
    segments.chain_heads(_PLACE, KEYS, but="")
    for event in newest:
        assert isinstance(query.fields(event), dict)
        try:
            receipt.make(_PLACE, f"{event.chain}:{event.seq}")
        except KmsError:
            continue


def _receipt(number: int) -> bytes:
    _FILE.write_bytes(GENUINE)
    return msgspec.json.encode(receipt.make(_PLACE, f"{NAME}:{number}"))


def _proves(data: bytes) -> None:
    """A receipt holds for lines of the genuine trail alone."""
    try:
        given = msgspec.json.decode(data, type=Receipt)
        line = receipt.check(given, KEYS)
    except (msgspec.DecodeError, UnicodeDecodeError, BadReceipt):
        return
    assert given.line.encode() in GENUINE.splitlines()
    assert given.id == f"{line.chain}:{line.seq}"

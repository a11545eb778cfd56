"""An audit log of version 1: three segments of the API (one was retired), two of a worker, and their anchors.

The tree's verification finds nothing wrong; heads, signatures and hidden values are also computed here.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from kms_core.audit import query
from kms_core.audit.hosts import HostLog
from kms_core.audit.keys import Concealer, PublicKeys, Signer
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import Receipt
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import verify
from kms_protocol.context import Context
from support.golden import expected_service as expected
from support.golden import golden_set, install, make_service
from support.golden.reference import hmac_sha256, prefixed_texts, sha256
from support.job_stores import connect

FOLDER: Final = golden_set.V1 / "audit"
LABEL: Final = b"kms-service/audit-checkpoint/1\n"
KINDS: Final = {"open", "checkpoint", "rotated", "closed", "resumed", "retired", ""}
HIDDEN_KEY: Final = base64.b64decode((golden_set.V1 / "keys/audit.key").read_text())
PLACED: Final = {"seq", "chain", "time", "head"}
OPENING: Final = PLACED | {"kind", "version", "segment", "reason", "service", "public_key"}
SIGNED: Final = PLACED | {"kind", "previous", "opened", "heads", "key", "signature"}


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def every_line(folder: Path = FOLDER) -> list[tuple[bytes, dict[str, Any]]]:
    paths = sorted((folder / "log").iterdir())
    return [(line, json.loads(line)) for path in paths for line in lines_of(path)]


def public_key() -> Ed25519PublicKey:
    found = load_pem_public_key((FOLDER / "signing.pub").read_bytes())
    assert isinstance(found, Ed25519PublicKey)
    return found


def keys() -> PublicKeys:
    return PublicKeys.read(FOLDER / "signing.pub")


def checked(folder: Path) -> VerificationReport:
    return verify(folder, keys(), {"here": FolderSink(FOLDER / "anchors").lines()})


# -- the code of the tree reads it -------------------------------------------------------------------


def test_log_is_intact() -> None:
    report = checked(FOLDER / "log")

    assert (report.problems, report.trusted, report.lines) == ([], True, 29)
    assert {(one.files, one.lines, one.signed_seq == one.last_seq) for one in report.chains} == {
        (3, 18, True),
        (2, 11, True),
    }
    assert [note.code for note in report.notes] == ["resumed"]


def test_every_signed_line_vouches() -> None:
    """Checkpoints too, which the signed ends of files would stand in for."""
    signed = [line for line, fields in every_line() if "signature" in fields]

    assert all(map(keys().signed, signed))


def test_anchors_are_compared(tmp_path: Path) -> None:
    """A log that lost its last file is behind its anchors."""
    log = golden_set.copied("audit/log", tmp_path)
    max(log.glob("worker-*")).unlink()

    assert checked(log).problems


def test_records_are_found() -> None:
    found = query.newest([HostLog("", FOLDER / "log")], query.EventFilter(), 50)

    principals = [f"ada-{number}" for number in (*range(4, 14), 0, 1, 3)]
    assert sorted(one.principal for one in found) == sorted(principals)
    assert {(one.operation, one.key_id, one.result) for one in found} == {("encrypt", "payroll", "ok")}


def test_receipt_holds() -> None:
    text = (FOLDER / "receipt.json").read_bytes()
    found = msgspec.json.decode(text, type=Receipt)

    assert receipt.check(found, keys()).operation == "encrypt"
    assert receipt.make(FOLDER / "log", found.id) == found


def test_context_values_are_hidden_as_before(tmp_path: Path) -> None:
    hidden = Concealer.at(golden_set.copied("keys/audit.key", tmp_path)).conceal(
        "acme", Context.parse(expected.CONTEXT)
    )

    by_hand = {
        name: hmac_sha256(HIDDEN_KEY, prefixed_texts("acme", name, value)).hex()[:32]
        for name, value in expected.CONTEXT.items()
    }
    assert dict(hidden) == by_hand
    assert [line["context"] for _, line in every_line() if "operation" in line] == [by_hand] * 13


def test_key_of_an_install_signs_what_the_golden_public_key_trusts(tmp_path: Path) -> None:
    install.put_keys(tmp_path)

    assert Signer.at(tmp_path / "audit-signing.key").key_id in keys().keys


# -- it is what version 1 says -----------------------------------------------------------------------


def _body(line: bytes) -> bytes:
    return line[: line.rindex(b',"head":"')]


def _next_head(before: bytes, line: bytes) -> bytes:
    return sha256(before + sha256(_body(line)))


def check_chain(lines: list[bytes]) -> None:
    """Heads follow one another; raises AssertionError."""
    before = bytes.fromhex(json.loads(lines[0]).get("previous", "00" * 32))
    for line in lines:
        before = _next_head(before, line)
        assert json.loads(line)["head"] == before.hex()


def check_signature(line: bytes, key: Ed25519PublicKey) -> None:
    """The signature stands over the label and the body before it; raises InvalidSignature."""
    unsigned, _, rest = _body(line).partition(b',"signature":"')
    key.verify(base64.b64decode(rest.rstrip(b'"')), LABEL + unsigned)


def check_log(folder: Path, key: Ed25519PublicKey) -> None:
    """Names, heads and signatures are those of version 1, as are the fields of every kind of line."""
    for path in (folder / "log").iterdir():
        assert re.fullmatch(r"(api|worker)-\d{8}T\d{6}\.\d{6}Z-\d+\.000\d\.jsonl", path.name)
        check_chain(lines_of(path))
    lines = every_line(folder)
    assert {fields.get("kind", "") for _, fields in lines} == KINDS
    for line, fields in lines:
        names = fields.keys() - {"clock"}
        if fields.get("kind") == "open":
            assert names - {"previous", "previous_opened", "heads"} == OPENING
            assert fields["version"] == 1
        elif "signature" in fields:
            assert names == SIGNED
            check_signature(line, key)
        elif "operation" in fields:
            assert names == {*expected.RECORD, "principal", "context"} | PLACED
            assert {name: fields[name] for name in expected.RECORD} == expected.RECORD


def test_log_is_of_version_1() -> None:
    check_log(FOLDER, public_key())

    signed = {line for line, fields in every_line() if "signature" in fields}
    assert len(signed) == 9
    assert len(signed & set(FolderSink(FOLDER / "anchors").lines())) == 6


def test_a_log_that_is_written_now_is_too(tmp_path: Path) -> None:
    install.put_keys(tmp_path)
    make_service.audit_log(tmp_path / "new", tmp_path)

    check_log(tmp_path / "new", public_key())


def test_receipt_is_that_of_version_1() -> None:
    found = json.loads((FOLDER / "receipt.json").read_text())
    line, checkpoint = found["line"].encode(), found["checkpoint"].encode()
    head = _next_head(bytes.fromhex(found["before"]), line)
    for digest in found["path"]:
        head = sha256(head + bytes.fromhex(digest))

    assert found["version"] == 1
    assert json.loads(checkpoint)["previous"] == head.hex()
    check_signature(checkpoint, public_key())


# -- what the tree writes, read as version 1 ---------------------------------------------------------


def test_new_anchors_lie_where_those_of_version_1_do(tmp_path: Path) -> None:
    file = min((FOLDER / "anchors").iterdir())
    for line in lines_of(file):
        FolderSink(tmp_path).put(line + b"\n")

    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_anchors_in_redis_are_those_of_version_1(redis_url: str) -> None:
    client = connect(redis_url)
    line = lines_of(min((FOLDER / "anchors").iterdir()))[0]
    client.xadd("kms:audit:anchors", {"line": line})
    RedisSink(client).put(line + b"\n")
    assert RedisSink(client).lines() == [line, line]

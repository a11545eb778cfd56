"""What fuzzing found once: bytes that no writer of ours makes, and the one error that each ends in."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kms_client.requests import ClientRequest, Reply, UnexpectedAnswer
from kms_core.audit import query
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import UnknownRecord
from kms_core.auth import jwks, tokens
from kms_core.auth.jwks import discover
from kms_core.settings.load import load as load_settings
from kms_protocol import admin, wire
from kms_protocol.errors import ConfigurationError
from support.audit_logs import AuditFolder, problem_codes, rewrite

pytestmark = pytest.mark.usefixtures("gc_disabled")
NESTED: Final = b'{"unknown":' + b"[" * 5000


@pytest.fixture
def audit_folder(tmp_path: Path) -> AuditFolder:
    return AuditFolder(tmp_path)


def on_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [change(line) if at == number else line for at, line in enumerate(lines)]


# -- the audit trail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [0, 2, 4], ids=["first", "middle", "last"])
def test_a_line_that_is_nested_without_end_is_unreadable_and_passed_over(
    audit_folder: AuditFolder, line: int
) -> None:
    path = audit_folder.written(3)
    rewrite(path, on_line(line, lambda _: NESTED + b"\n"))

    assert "unreadable" in problem_codes(audit_folder.verified())
    assert len(query.newest(audit_folder.logs, query.EventFilter(), 10)) == (2 if line == 2 else 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"public_key":"', b'"public_key":"zz'),
        lambda line: re.sub(rb'"public_key":"..', b'"public_key":"zz', line),
        lambda line: line.replace(b'"kind":"open"', b'"kind":"open","previous":"zz"'),
    ],
    ids=["longer key", "key", "previous"],
)
def test_an_opening_line_without_hex_digits_is_an_edit(
    audit_folder: AuditFolder, change: Callable[[bytes], bytes]
) -> None:
    path = audit_folder.written(3)
    rewrite(path, on_line(0, change))

    assert "edited" in problem_codes(audit_folder.verified())


@pytest.mark.parametrize("line", [0, 2, 4], ids=["first", "middle", "last"])
def test_the_head_of_a_line_in_capitals_is_found(audit_folder: AuditFolder, line: int) -> None:
    path = audit_folder.written(3)
    rewrite(path, on_line(line, lambda text: text[:-67] + text[-67:-3].upper() + text[-3:]))

    assert problem_codes(audit_folder.verified()) == ["unreadable"]


def test_a_line_that_is_no_text_has_no_receipt(audit_folder: AuditFolder) -> None:
    path = audit_folder.written(3)
    rewrite(path, on_line(2, lambda line: line.replace(b'"credential":"test"', b'"credential":"t\xeest"')))
    chain = json.loads(path.read_bytes().splitlines()[0])["chain"]

    with pytest.raises(UnknownRecord):
        receipt.make(audit_folder.folder, f"{chain}:2")


# -- files and answers of others ---------------------------------------------------------------------


def test_a_token_file_that_is_nested_without_end_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_bytes(NESTED)

    with pytest.raises(ConfigurationError, match="not a file that kms token wrote"):
        tokens.read(path)


@pytest.mark.parametrize("data", [NESTED, b'{"\xff":1}'], ids=["nested", "no text"])
def test_a_strange_key_set_is_none(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"key set|Key Set"):
        jwks.parse(data)


def test_a_discovery_document_that_is_nested_without_end_is_none() -> None:
    with pytest.raises(ValueError, match="discovery document"):
        discover("https://id.example.com", lambda _: NESTED, in_dev=False)


def test_an_answer_that_is_nested_without_end_is_not_one_of_this_api() -> None:
    call = ClientRequest("GET", f"{wire.PREFIX}/health", admin.HealthOut)

    with pytest.raises(UnexpectedAnswer):
        call.read(Reply(200, {}, NESTED))


# -- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[kms]\na = " + "[" * 3000,
        "[kms]\na = " + "{a=" * 3000,
        "[kms]\n" + "a." * 3000 + "a = 1",
        "[kms]\nport = " + "9" * 5000,
    ],
    ids=["arrays", "tables", "keys", "digits"],
)
def test_a_file_that_no_toml_reader_takes_is_a_wrong_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kms.toml"
    path.write_text(text)

    with pytest.raises(ConfigurationError, match="tables are nested too deep"):
        load_settings(path, {"HOME": "/home/nobody"})


def test_a_variable_that_is_no_text_is_a_wrong_configuration() -> None:
    with pytest.raises(ConfigurationError, match=r"kms.port \(from KMS_PORT\): expected text in UTF-8"):
        load_settings(None, {"HOME": "/home/nobody", "KMS_PORT": "\udcb9"})

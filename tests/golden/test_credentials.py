"""Tokens, age plugin names, moved ciphertexts and payloads of Temporal, as version 1 left them."""

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from kms_cli.commands.migrate import MovedRecord, continued
from kms_cli.plugin.names import IDENTITY_PREFIX, RECIPIENT_PREFIX, PluginTarget
from kms_core.auth import tokens
from kms_core.auth.tokens import TokenFile, TokenRequest
from kms_protocol.context import Context
from kms_protocol.errors import Unauthenticated
from support.golden import expected_service as expected
from support.golden import golden_set, install, reference
from support.golden.golden_set import b64

TEXTS: Final[dict[str, str]] = golden_set.document("keys/tokens.json")["texts"]
NAMES: Final[list[dict[str, str]]] = golden_set.document("plugin.json")
SAID: Final[list[dict[str, Any]]] = [
    {"key": "payroll", "ctx": {"env": "prod", "größe": "drei"}, "url": "https://kms.example:8443"},
    {"local": True},
]
TARGETS: Final = [
    PluginTarget("payroll", Context.parse({"env": "prod", "größe": "drei"}), "https://kms.example:8443"),
    PluginTarget(None, Context(), None, in_process=True),
]


# -- tokens ------------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> TokenFile:
    return TokenFile(golden_set.copied("tokens.json", tmp_path), strict=True)


@pytest.mark.parametrize("text", ["forever", "narrow", "rotated", "rotated-new"])
def test_token_is_known(token_file: TokenFile, text: str) -> None:
    name = text.removesuffix("-new")
    tenant, scopes, _ = expected.TOKENS[name]
    found = token_file.authenticate(TEXTS[text])

    assert (found.name, found.tenant, found.scopes) == (name, tenant, scopes)
    assert found.id == TEXTS[text].split("_")[1]


def test_expired_token_is_refused_as_expired(token_file: TokenFile) -> None:
    with pytest.raises(Unauthenticated) as caught:
        token_file.authenticate(TEXTS["expired"])

    assert caught.value.reason == "expired"


def test_token_file_is_of_version_1() -> None:
    found = golden_set.document("tokens.json")
    held = {token["name"]: token for token in found["tokens"]}

    assert found["version"] == 1
    for text, plain in TEXTS.items():
        token = held[text.removesuffix("-new")]
        assert hashlib.sha256(plain.encode()).digest() in map(_digest, token["digests"])


def _digest(stored: dict[str, str]) -> bytes:
    return base64.b64decode(stored["sha256"])


def test_new_token_file_is_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    made, text = tokens.create(path, TokenRequest("ci", "acme", ("status",), timedelta(days=1)))
    found = json.loads(path.read_text())

    assert found.keys() == {"version", "tokens"}
    assert (found["version"], len(found["tokens"])) == (1, 1)
    (token,) = found["tokens"]
    assert token.keys() == {"id", "name", "tenant", "scopes", "created_at", "expires_at", "digests"}
    assert text.startswith(f"kms_{made.id}_")
    assert token["digests"] == [{"sha256": b64(hashlib.sha256(text.encode()).digest()), "until": None}]
    assert datetime.fromisoformat(token["expires_at"]) > datetime.now(UTC)


# -- names of age plugins ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_plugin_names_are_of_version_1_and_read_and_written_as_before(number: int) -> None:
    given, target = NAMES[number], TARGETS[number]

    assert PluginTarget.parse(given["recipient"], RECIPIENT_PREFIX) == target
    assert PluginTarget.parse(given["identity"], IDENTITY_PREFIX) == target
    assert (target.recipient(), target.identity()) == (given["recipient"], given["identity"])
    for text, prefix in ((given["recipient"], "age1kms1"), (given["identity"], "AGE-PLUGIN-KMS-1")):
        data = reference.bech32_data(text)
        assert text.startswith(prefix)
        assert (data[:1], json.loads(data[1:])) == (b"\x01", SAID[number])


# -- moved ciphertexts, and payloads of Temporal -----------------------------------------------------


def test_move_goes_on_where_an_earlier_version_ended(tmp_path: Path) -> None:
    path = golden_set.copied("migrated.jsonl", tmp_path)
    before = path.read_bytes()
    records = [MovedRecord(line=number, source=f"{number:064x}") for number in (1, 2, 3)]
    with continued(path) as lines:
        assert list(map(lines.has, records)) == [True, True, False]
    assert path.read_bytes() == before


def test_moved_lines_are_of_version_1(tmp_path: Path) -> None:
    file = golden_set.entry("age-x25519/small-bound").file
    common = {"ciphertext": b64(file), **expected.REWRAPPED_KEY}
    by_hand = [
        {"line": 1, "reference": "invoice-7", "source": f"{1:064x}", **common},
        {"line": 2, "source": f"{2:064x}", **common},
    ]
    with continued(tmp_path / "new.jsonl") as lines:
        lines.put([MovedRecord(line=2, source=f"{2:064x}", ciphertext=file, **expected.REWRAPPED_KEY)])

    assert list(map(json.loads, (golden_set.V1 / "migrated.jsonl").read_bytes().splitlines())) == by_hand
    assert json.loads((tmp_path / "new.jsonl").read_bytes()) == by_hand[1]


def test_payloads_of_temporal_are_decoded(tmp_path: Path) -> None:
    given = golden_set.document("codec.json")
    (payload,) = given["payloads"]

    assert payload["metadata"] == {"encoding": b64(b"binary/encrypted"), "encryption-key-id": b64(b"default")}
    with install.service(tmp_path, "unix:///nonexistent/valkey.sock") as service:
        service.start("api")
        answer = service.post("/codec/decode", given, headers=expected.NAMESPACE)
        assert answer.json() == {"payloads": [expected.PAYLOAD]}

"""Paths of the façade, the numbers of key versions, and which contexts a rewrap keeps."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest
from fastapi import FastAPI

from kms_api import app, routing
from kms_api.app import open_paths
from kms_api.routing import VAULT
from kms_api.vault_api.bound import Extra
from kms_api.vault_api.models import Item, VaultCiphertext, VaultPlaintext
from kms_api.vault_api.sys import shape
from kms_core.backends import KeyVersion
from kms_core.backends.remote import RemoteBackend
from kms_core.keyring import Key
from kms_protocol.context import NUMBER, Context
from kms_protocol.errors import InvalidContext
from support.credentials import REQUIRED, SecuredService
from support.memory_kms import MemoryCipher

PATHS: Final = {
    "transit/encrypt/k": ("{mount}/encrypt/{name}", "k"),
    "a/b/transit/decrypt/k": ("{mount}/decrypt/{name}", "k"),
    "transit/rewrap/a.b-c_d": ("{mount}/rewrap/{name}", "a.b-c_d"),
    "transit/datakey/plaintext/k": ("{mount}/datakey/plaintext/{name}", "k"),
    "a/b/datakey/wrapped/k": ("{mount}/datakey/wrapped/{name}", "k"),
    "transit/keys/k": ("{mount}/keys/{name}", "k"),
    "transit/keys/keys": ("{mount}/keys/{name}", "keys"),
    "transit/keys/encrypt/rotate": ("{mount}/keys/{name}/rotate", "encrypt"),
    "transit/keys/k/config": ("{mount}/keys/{name}/config", "k"),
    "transit/keys": ("{mount}/keys", ""),
    "a/b/keys/": ("{mount}/keys", ""),
    "sys/internal/ui/mounts/a/b": ("sys/internal/ui/mounts/{mount}", ""),
    "sys/health": ("sys/health", ""),
}


ROUTES: Final = routing.Dispatcher(FastAPI(), {"": app.VAULT})


def find(method: str, path: str, query: bytes = b"") -> tuple[str, Mapping[str, str]]:
    """The template of a path below /v1/, empty for none, and its parameters."""
    scope = {"method": method, "path": VAULT + path, "query_string": query}
    methods, names = ROUTES.find(method, routing.path_of(scope))
    return next((route.path for route in methods.values()), ""), names


@pytest.mark.parametrize(("path", "found"), PATHS.items(), ids=PATHS)
def test_a_path_is_read_from_its_end(path: str, found: tuple[str, str]) -> None:
    template, names = find("GET", path)

    assert (template, names.get("name", "")) == (VAULT + found[0], found[1])


@pytest.mark.parametrize(
    ("path", "template"),
    [("a/keys", "{mount}/keys"), ("a/keys/keys", "{mount}/keys"), ("a/keys/k", ""), ("keys", "")],
)
def test_only_keys_are_listed(path: str, template: str) -> None:
    assert find("LIST", path)[0] == find("GET", path, b"list=true")[0] == (template and VAULT + template)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "encrypt/k",
        "keys",
        "/encrypt/k",
        "a//encrypt/k",
        "a/encrypt/",
        "a/datakey/k",
        "a/datakey/x/k",
        "a/k",
    ],
)
def test_what_is_no_path_of_transit_is_none(path: str) -> None:
    assert find("GET", path)[0] == ""


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["transit/encrypt/default", "sys/health"])
async def test_a_vault_api_that_is_off_has_no_path(tmp_path: Path, redis_url: str, path: str) -> None:
    install = SecuredService(tmp_path / "state", f"{REQUIRED}[kms.facade]\nenabled = false\n", redis_url)
    within = httpx.ASGITransport(app.build(install.settings))
    async with httpx.AsyncClient(transport=within, base_url="http://localhost") as client:
        answer = await client.post(f"/v1/{path}", headers=install.token_header("*"), json={})
    install.http.close()

    assert answer.status_code == 404
    assert [text.partition(":")[0] for text in answer.json()["errors"]] == ["no handler for route"]


def test_what_is_open_tells_no_secret() -> None:
    found = {path for path in open_paths() if path.startswith(VAULT)}

    assert {f"{VAULT}sys/{name}" for name in ("health", "seal-status", "init", "leader")} == found


def test_nothing_prints_what_a_call_binds_or_returns() -> None:
    held = VaultPlaintext(b"salary"), VaultCiphertext("vault:v1:AAAA", 1), Item("salary"), Extra(b"salary")
    for one in held:
        assert repr(one) == f"{type(one).__name__}(…)"
        assert one.__rich_repr__() == []


# -- numbers -------------------------------------------------------------------------------------------


class Versioned(MemoryCipher):
    """A peer with these versions."""

    def __init__(self, name: str, versions: Sequence[KeyVersion]) -> None:
        super().__init__(name)
        self._all = versions

    def versions(self) -> Sequence[KeyVersion]:
        return self._all


def numbers(name: str, *versions: tuple[str, int | None]) -> Mapping[str, int]:
    made = [
        KeyVersion(version, None if day is None else datetime(2026, 1, day, tzinfo=UTC))
        for version, day in versions
    ]
    return Key("k", RemoteBackend(Versioned(name, made))).numbers()


def test_a_backend_that_counts_has_its_own_numbers() -> None:
    assert numbers("transit", ("3", 1), ("4", 2), ("7", 3)) == {"3": 3, "4": 4, "7": 7}


def test_other_versions_are_counted_in_the_order_in_which_they_were_made() -> None:
    assert numbers("age", ("bb", 2), ("cc", 3), ("aa", 1)) == {"aa": 1, "bb": 2, "cc": 3}
    assert numbers("awskms", ("x", None), ("y", None)) == {"x": 1, "y": 2}
    assert numbers("age", ("bb", None), ("aa", 1)) == {"bb": 1, "aa": 2}


def test_a_name_of_digits_is_no_number() -> None:
    assert numbers("age", ("12345678", 1), ("00000001", 2)) == {"12345678": 1, "00000001": 2}


class Rotated(RemoteBackend):
    """Another process rotates after our first look."""

    looks = 0

    def versions(self) -> Sequence[KeyVersion]:
        self.looks += 1
        return [*super().versions(), *[KeyVersion("9")] * (self.looks > 1)]


def test_a_key_that_is_rotated_meanwhile_has_a_record() -> None:
    made = [KeyVersion(version, None) for version in ("3", "4")]

    assert shape(Key("k", Rotated(Versioned("transit", made)))).latest_version == 4


# -- contexts ------------------------------------------------------------------------------------------


def test_a_number_moves_and_nothing_else() -> None:
    old = Context.reserved({NUMBER: "v1", "kms:transit.context": "YQ=="})

    assert old.is_kept_by(Context.reserved({NUMBER: "v2", "kms:transit.context": "YQ=="}))
    for other in (
        Context.reserved({NUMBER: "v1"}),
        Context.reserved({NUMBER: "v1", "kms:transit.context": "Yg=="}),
        Context.reserved({"kms:transit.context": "YQ=="}),
        Context(),
    ):
        assert not old.is_kept_by(other)
        assert not other.is_kept_by(old)
    assert not Context.parse("a=b").is_kept_by(Context.parse("a=c"))


def test_reserved_pairs_are_no_callers_and_bounded() -> None:
    for key in (NUMBER, "kms:transit.context", "kms:transit.associated_data"):
        with pytest.raises(InvalidContext, match="reserved"):
            Context.parse({key: "v1"})
    with pytest.raises(InvalidContext, match="8192"):
        Context.reserved({NUMBER: "v" * 8192})

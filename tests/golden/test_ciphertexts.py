"""Every ciphertext of the golden set opens with the code of the tree, and is as version 1 describes it.

The second half holds without the code under test: MACs, tags and AADs are computed by ``golden.reference``.
"""

from collections.abc import Sequence
from typing import Final

import pytest

from kms_api.vault_api import bound, models
from kms_api.vault_api.bound import Extra
from kms_core.age import armor
from kms_core.auth.policy import Principal
from kms_core.service import Kms
from kms_protocol.context import Context
from support.age_kms import kms_over
from support.golden import backends, golden_set, reference
from support.golden.golden_set import Entry
from support.golden.reference import Names, Stanza

ENTRIES: Final = golden_set.entries()
PADDED_BYTES: Final = 4096
VAULT: Final = {
    "vault-api/plain": Extra(number=2),
    "vault-api/context": Extra(context=b"acme payroll", number=2),
    "vault-api/both": Extra(context=b"acme payroll", associated_data=b"row 7", number=2),
}


def _every(entries: Sequence[Entry]) -> pytest.MarkDecorator:
    marks = [[pytest.mark.cosmian] if one.backend.startswith("cosmian") else [] for one in entries]
    cases = [pytest.param(one, id=one.name, marks=mark) for one, mark in zip(entries, marks, strict=True)]
    return pytest.mark.parametrize("entry", cases)


def kms_of(backend: str) -> Kms:
    """A service whose key ``payroll``, like its default key, is the golden key of this backend."""
    made = backends.of(backend)
    return kms_over(made, {"payroll": made})


def who(entry: Entry) -> Principal:
    return Principal("golden", entry.tenant, "test")


def context_of(entry: Entry) -> Context:
    if entry.name.startswith("vault-api/"):
        return Context.reserved(entry.context)
    return Context.parse(entry.context)


# -- the code of the tree opens them -----------------------------------------------------------------


@_every(ENTRIES)
def test_ciphertext_opens(entry: Entry) -> None:
    opened = kms_of(entry.backend).decrypt(who(entry), entry.file, context_of(entry))

    assert opened.plaintext == entry.plaintext
    assert opened.origin == entry.origin
    key = opened.key
    assert Names(key.tenant, key.key_id, key.version, key.backend) in {
        entry.names,
        Names(entry.tenant, "default", entry.version, entry.scheme) if entry.origin == "foreign" else None,
    }


@_every([one for one in ENTRIES if one.name.startswith("several")])
def test_every_backend_of_several_opens_alone(entry: Entry) -> None:
    for name in entry.wraps:
        opened = kms_of(name).decrypt(who(entry), entry.file, context_of(entry))
        assert opened.plaintext == entry.plaintext


@_every([one for one in ENTRIES if one.name.endswith("/bundle")])
def test_bundle_of_the_plugin_opens(entry: Entry) -> None:
    """As ``age-plugin-kms`` asks: the stanzas alone, without header or payload."""
    stanza = next(one for one in _outer(entry) if one.args[0] == "kms-service/bundle")

    found = kms_of(entry.backend).unwrap(who(entry), reference.rendered(stanza), context_of(entry))

    assert (found.file_key, found.origin) == (entry.file_key, "service")


@pytest.mark.parametrize("name", VAULT)
def test_ciphertext_of_the_vault_api_opens(name: str) -> None:
    text = next(one["text"] for one in golden_set.document("texts.json") if one["entry"] == name)
    entry, kms = golden_set.entry(name), kms_of("age-x25519")

    number, file = models.parse(text)

    assert (number, file) == (2, entry.file)
    assert bound.decrypt_bound(kms, who(entry), file, VAULT[name], key_id="payroll") == entry.plaintext


def test_armored_file_opens() -> None:
    found = golden_set.document("texts.json")[0]

    assert armor.dearmor(found["text"].encode()) == golden_set.entry(found["entry"]).file


# -- they are what version 1 says --------------------------------------------------------------------


def _outer(entry: Entry) -> list[Stanza]:
    return reference.parsed(entry.head, entry.file_key)


def stanzas(entry: Entry) -> list[Stanza]:
    """Those of the header, those of a bundle in its place."""
    found: list[Stanza] = []
    for stanza in _outer(entry):
        inside = stanza.args == ("kms-service/bundle", "1")
        found += reference.stanzas_of(stanza.body) if inside else [stanza]
    return found


def of(entry: Entry, kind: str) -> list[Stanza]:
    return [stanza for stanza in stanzas(entry) if stanza.args[0] == kind]


def shapes_of(entry: Entry) -> list[tuple[str, int]]:
    return [(stanza.args[0], len(stanza.args)) for stanza in stanzas(entry)]


@_every([one for one in ENTRIES if one.origin == "service"])
def test_context_stanza_binds_names_and_context(entry: Entry) -> None:
    (stanza,) = of(entry, "kms-service/context")
    _, version, key_id, key_version, salt = stanza.args

    assert (version, key_id, key_version) == ("1", entry.key_id, entry.version)
    tag = reference.context_tag(entry.file_key, reference.decoded(salt), entry.names, entry.context)
    assert stanza.body == tag


@_every([one for one in ENTRIES if one.origin == "service"])
def test_stanzas_are_those_of_version_1(entry: Entry) -> None:
    native = {"age-x25519": ("X25519", 2), "age-mlkem768x25519": ("mlkem768x25519", 2)}
    wraps = entry.wraps or (entry.backend,)
    wrap = ("kms-service/wrap", 5 if "/job-" in entry.name else 4)
    expected = [native.get(name, wrap) for name in wraps] + [("kms-service/context", 5)]
    expected += [("kms-service/origin", 2) for name in wraps if name in native]
    if "/padded" in entry.name:
        expected.append(("kms-service/pad", 2))
    if entry.name.endswith("/bundle"):
        expected.insert(0, ("golden-grease", 2))

    assert shapes_of(entry) == expected
    assert "/padded" not in entry.name or len(entry.head) == PADDED_BYTES + 16


def versions_of(backend: str) -> list[str]:
    """The first 8 hex digits of the SHA-256 of each recipient."""
    return [reference.sha256(text.encode()).hex()[:8] for text in golden_set.recipients(backend)]


@_every([one for one in ENTRIES if of(one, "kms-service/origin")])
def test_origin_binds_identity_names_context_and_payload(entry: Entry) -> None:
    (stanza,) = of(entry, "kms-service/origin")
    handed = entry.name.endswith("/bundle")
    native = next(name for name in entry.wraps or (entry.backend,) if name in backends.AGE)
    version = entry.version if entry.scheme == "age" else versions_of(native)[1]
    key = reference.Names(entry.tenant, entry.key_id, version, "age")
    secret = golden_set.identity_secret(native, versions_of(native).index(version))
    mac_key = reference.origin_key(secret)
    nonce = None if handed else entry.nonce

    assert stanza.args == ("kms-service/origin", "2" if handed else "1")
    assert stanza.body == reference.origin_tag(mac_key, entry.file_key, nonce, key, entry.context)


@_every([one for one in ENTRIES if of(one, "kms-service/wrap")])
def test_remote_wrap_authenticates_version_1s_aad(entry: Entry) -> None:
    """Each peer opens its wrap with the AAD that the reference computes, and with no other."""
    (context,) = of(entry, "kms-service/context")
    for stanza in of(entry, "kms-service/wrap"):
        _, scheme, key_id, version, *job = stanza.args
        key = reference.Names(entry.tenant, key_id, version, scheme)
        aad = reference.wrap_aad(key, context.body)
        if not job:
            assert backends.peer_opens(scheme, version, stanza.body, aad) == entry.file_key
            continue
        secret = backends.peer_opens(scheme, version, reference.decoded(job[0]), reference.job_aad(key))
        assert reference.salted_open(secret, b"kms-service/job/1", stanza.body, aad) == entry.file_key


@_every([one for one in ENTRIES if one.backend == "age-x25519"])
def test_another_age_tool_opens_native_files(entry: Entry) -> None:
    if entry.name.endswith("/bundle"):
        assert reference.opened_file(entry.file, entry.file_key) == entry.plaintext
        return
    assert golden_set.opened_by_pyrage(entry.file) == entry.plaintext

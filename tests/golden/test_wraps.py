"""Files of age keys with ``native=false``, and of remote keys with ``share``, open and are as documented."""

import json
from collections.abc import Callable
from typing import Final

import pytest

from kms_core.auth.policy import Principal
from kms_core.backends import Backend
from kms_protocol.context import Context
from support.age_kms import kms_over
from support.golden import backends, golden_set, reference, wrap_backends
from support.golden.golden_set import Entry
from support.golden.reference import Names, Stanza

AGE: Final = tuple(golden_set.entry_of(stored) for stored in json.loads(wrap_backends.PATH.read_text()))
SHARED: Final = [
    pytest.param(entry, id=entry.name, marks=[pytest.mark.cosmian] if "cosmian" in entry.name else [])
    for entry in map(golden_set.entry_of, json.loads(wrap_backends.SHARED.read_text()))
]
EVERY: Final = pytest.mark.parametrize("entry", AGE, ids=lambda entry: str(entry.name))
INFO: Final = b"kms-service/wrap-age/1"
Make = Callable[[str], Backend]


def check_opens(entry: Entry, made: Backend) -> None:
    kms = kms_over(made, {"payroll": made}, accept_foreign=False)
    who = Principal("golden", entry.tenant, "test")
    opened = kms.decrypt(who, entry.file, Context.parse(entry.context))

    assert (opened.plaintext, opened.origin) == (entry.plaintext, "service")
    assert opened.key.version == entry.version


@EVERY
@pytest.mark.parametrize("native", [False, True], ids=["native=false", "native"])
def test_file_of_an_age_key_opens(entry: Entry, native: bool) -> None:
    check_opens(entry, backends.age(entry.backend, native=native))


@pytest.mark.parametrize("entry", SHARED)
@pytest.mark.parametrize("made", [backends.of, wrap_backends.sharing], ids=["without share", "share=5m"])
def test_file_of_a_shared_wrap_key_opens(entry: Entry, made: Make) -> None:
    check_opens(entry, made(entry.backend))


def stanzas(entry: Entry) -> list[Stanza]:
    outer = reference.parsed(entry.head, entry.file_key)
    return list(reference.stanzas_of(outer[0].body)) if "/wrap-bundle" in entry.name else outer


@EVERY
def test_wrap_is_sealed_under_the_identity_with_the_aad(entry: Entry) -> None:
    wrap, context, origin, *pad = stanzas(entry)
    secrets = [golden_set.identity_secret(entry.backend, number) for number in (0, 1)]
    secret = secrets[0 if "older" in entry.name else 1]
    names = Names(entry.tenant, entry.key_id, entry.version, "age")
    aad = reference.wrap_aad(names, context.body)
    nonce = None if "/wrap-bundle" in entry.name else entry.nonce

    assert wrap.args == ("kms-service/wrap", "age", entry.key_id, entry.version)
    assert len(wrap.body) == 64
    assert reference.salted_open(secret, INFO, wrap.body, aad) == entry.file_key
    assert context.body == reference.context_tag(
        entry.file_key, reference.decoded(context.args[4]), names, entry.context
    )
    assert origin.body == reference.origin_tag(
        reference.origin_key(secret), entry.file_key, nonce, names, entry.context
    )
    assert [stanza.args[0] for stanza in pad] == (["kms-service/pad"] if "/wrap-padded" in entry.name else [])


@pytest.mark.parametrize("name", backends.AGE)
def test_new_file_is_of_this_format(name: str) -> None:
    backend = wrap_backends.backend_of(name)
    made = kms_over(backend).encrypt(Principal("golden", "acme", "test"), b"salary", Context.parse("row=7"))
    wrap, context, _ = reference.unverified_stanzas(made.ciphertext)
    aad = reference.wrap_aad(Names("acme", "default", made.key.version, "age"), context.body)
    file_key = reference.salted_open(golden_set.identity_secret(name), INFO, wrap.body, aad)

    assert reference.opened_file(made.ciphertext, file_key) == b"salary"


@pytest.mark.parametrize("entry", SHARED)
def test_wrap_key_and_file_key_authenticate_their_aads(entry: Entry) -> None:
    wrap, context = reference.parsed(entry.head, entry.file_key)
    kind, scheme, key_id, version, job = wrap.args
    names = Names(entry.tenant, key_id, version, scheme)
    secret = backends.peer_opens(scheme, version, reference.decoded(job), reference.job_aad(names))
    aad = reference.wrap_aad(names, context.body)

    assert (kind, scheme, key_id, version) == ("kms-service/wrap", entry.scheme, entry.key_id, entry.version)
    assert (len(secret), len(wrap.body)) == (32, 64)
    assert reference.salted_open(secret, b"kms-service/job/1", wrap.body, aad) == entry.file_key

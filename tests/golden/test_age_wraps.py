"""Files of age keys with ``native=false`` open, and are what docs/design.md describes."""

import json
from typing import Final

import pytest

from kms_core.auth.policy import Principal
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from support.age_kms import kms_over
from support.golden import backends, make_wraps, manifest, reference
from support.golden.manifest import Entry
from support.golden.reference import Names, Stanza

ENTRIES: Final = tuple(manifest.entry_of(stored) for stored in json.loads(make_wraps.PATH.read_text()))
EVERY: Final = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry.name))
INFO: Final = b"kms-service/wrap-age/1"


def kms_of(entry: Entry, *, native: bool) -> Kms:
    made = backends.age(entry.backend, native=native)
    return kms_over(made, {"payroll": made}, accept_foreign=False)


@EVERY
@pytest.mark.parametrize("native", [False, True], ids=["native=false", "native"])
def test_file_opens(entry: Entry, native: bool) -> None:
    kms, context = kms_of(entry, native=native), Context.parse(entry.context)
    opened = kms.decrypt(Principal("golden", entry.tenant, "test"), entry.file, context)

    assert (opened.plaintext, opened.origin, opened.key.version) == (
        entry.plaintext,
        "service",
        entry.version,
    )
    with pytest.raises(DecryptFailed):
        kms.decrypt(Principal("golden", "rival", "test"), entry.file, context)
    with pytest.raises(DecryptFailed):
        kms.decrypt(Principal("golden", entry.tenant, "test"), entry.file, Context.parse("env=dev"))


def stanzas(entry: Entry) -> list[Stanza]:
    outer = reference.parsed(entry.head, entry.file_key)
    return list(reference.stanzas_of(outer[0].body)) if "/wrap-bundle" in entry.name else outer


@EVERY
def test_wrap_is_sealed_under_the_identity_with_the_aad(entry: Entry) -> None:
    wrap, context, origin, *pad = stanzas(entry)
    secrets = [manifest.identity_secret(entry.backend, number) for number in (0, 1)]
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
    backend = make_wraps.backend_of(name)
    made = kms_over(backend).encrypt(Principal("golden", "acme", "test"), b"salary", Context.parse("row=7"))
    wrap, context, _ = reference.unverified_stanzas(made.ciphertext)
    aad = reference.wrap_aad(Names("acme", "default", made.key.version, "age"), context.body)
    file_key = reference.salted_open(manifest.identity_secret(name), INFO, wrap.body, aad)

    assert reference.opened_file(made.ciphertext, file_key) == b"salary"


def test_the_set_is_never_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_wraps.main() == 1
    assert "never made again" in capsys.readouterr().err

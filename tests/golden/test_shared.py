"""Files of remote keys with ``share`` open, with and without that option, and are what is documented."""

import json
from typing import Final

import pytest

from kms_core.auth.policy import Principal
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed
from support.age_kms import kms_over
from support.golden import backends, make_wraps, manifest, reference
from support.golden.manifest import Entry
from support.golden.reference import Names

ENTRIES: Final = tuple(manifest.entry_of(stored) for stored in json.loads(make_wraps.SHARED.read_text()))
EVERY: Final = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.cosmian] if "cosmian" in one.name else [])
        for one in ENTRIES
    ],
)


@EVERY
@pytest.mark.parametrize("shares", [False, True], ids=["without share", "share=5m"])
def test_file_opens(entry: Entry, shares: bool) -> None:
    made = make_wraps.sharing(entry.backend) if shares else backends.of(entry.backend)
    kms, context = kms_over(made, {"payroll": made}), Context.parse(entry.context)
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


@EVERY
def test_wrap_key_and_file_key_authenticate_their_aads(entry: Entry) -> None:
    wrap, context = reference.parsed(entry.head, entry.file_key)
    kind, scheme, key_id, version, job = wrap.args
    names = Names(entry.tenant, key_id, version, scheme)
    secret = backends.peer_opens(scheme, version, reference.decoded(job), reference.job_aad(names))
    aad = reference.wrap_aad(names, context.body)

    assert (kind, scheme, key_id, version) == ("kms-service/wrap", entry.scheme, entry.key_id, entry.version)
    assert (len(secret), len(wrap.body)) == (32, 64)
    assert reference.salted_open(secret, b"kms-service/job/1", wrap.body, aad) == entry.file_key

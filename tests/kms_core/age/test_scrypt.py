"""Passphrase stanzas: alone in their header, bounded in cost, silent about why a passphrase fails."""

import os
from dataclasses import replace

import pyrage
import pytest

from kms_core.age import header, scrypt, stream
from kms_core.age.header import Stanza
from kms_core.age.x25519 import NoMatch, X25519Identity
from kms_protocol.errors import DecryptFailed

FILE_KEY = bytes(range(16))
STANZA = scrypt.wrap(FILE_KEY, "åle 7", 2)
TYPE, SALT, COST = STANZA.args


def test_the_passphrase_opens_what_it_wrapped() -> None:
    assert scrypt.unwrap(STANZA, "åle 7") == FILE_KEY


def test_pyrage_opens_it() -> None:
    nonce = os.urandom(16)
    sealed = stream.seal(stream.payload_key(FILE_KEY, nonce), b"salary")
    file = header.render([STANZA], FILE_KEY) + nonce + sealed

    assert pyrage.passphrase.decrypt(file, "åle 7") == b"salary"


def test_another_passphrase_or_stanza_does_not_match() -> None:
    with pytest.raises(NoMatch):
        scrypt.unwrap(STANZA, "ale 7")
    with pytest.raises(NoMatch):
        scrypt.unwrap(replace(STANZA, args=("Scrypt", SALT, COST)), "åle 7")


def test_cost_is_capped_before_it_is_paid() -> None:
    with pytest.raises(DecryptFailed, match="work factor 19, above the 18") as caught:
        scrypt.unwrap(replace(STANZA, args=(TYPE, SALT, "19")), "åle 7")
    assert not isinstance(caught.value, NoMatch)


@pytest.mark.parametrize(
    "stanza",
    [
        replace(STANZA, args=(TYPE, SALT)),
        replace(STANZA, args=(TYPE, SALT, COST, COST)),
        replace(STANZA, args=(TYPE, SALT[:-1], COST)),
        replace(STANZA, args=(TYPE, "AAAA", COST)),
        *(replace(STANZA, args=(TYPE, SALT, cost)) for cost in ("0", "02", "+2", "-2", "0x2", "2a", "9999")),
        replace(STANZA, body=STANZA.body + b"\0"),
    ],
    ids=["short", "long", "spare-bits", "salt", "0", "02", "+2", "-2", "0x2", "2a", "9999", "body"],
)
def test_malformed_stanzas_fail_the_file(stanza: Stanza) -> None:
    with pytest.raises(DecryptFailed) as caught:
        scrypt.unwrap(stanza, "åle 7")
    assert not isinstance(caught.value, NoMatch)


def test_a_passphrase_stanza_stands_alone() -> None:
    other = X25519Identity.generate().recipient.wrap(FILE_KEY)

    assert scrypt.stanza_of([STANZA]) is STANZA
    assert scrypt.stanza_of([other, other]) is None
    for mixed in ([STANZA, other], [STANZA, STANZA]):
        with pytest.raises(DecryptFailed):
            scrypt.stanza_of(mixed)

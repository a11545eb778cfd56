"""HMAC and HKDF against those of the standard library and of ``cryptography``."""

import hmac

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from kms_core.age import kdf

KEYS = st.binary(max_size=70) | st.binary(min_size=63, max_size=65) | st.binary(min_size=128, max_size=130)


@given(KEYS, st.binary(max_size=200))
def test_the_mac_is_hmac_sha256(key: bytes, message: bytes) -> None:
    assert kdf.mac(key, message) == hmac.digest(key, message, "sha256")


@given(st.binary(max_size=40), KEYS, st.binary(max_size=40))
def test_the_derived_key_is_hkdf_sha256(secret: bytes, salt: bytes, info: bytes) -> None:
    assert kdf.hkdf(secret, salt=salt, info=info) == HKDF(SHA256(), kdf.KEY_BYTES, salt, info).derive(secret)

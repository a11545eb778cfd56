"""HKDF against its definition in RFC 5869, made of the HMAC of the standard library."""

import hmac

from hypothesis import given
from hypothesis import strategies as st

from kms_core.age import header

SALTS = st.binary(max_size=70) | st.binary(min_size=63, max_size=65) | st.binary(min_size=128, max_size=130)


@given(st.binary(max_size=40), SALTS, st.binary(max_size=40))
def test_the_derived_key_is_hkdf_sha256(secret: bytes, salt: bytes, info: bytes) -> None:
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    expanded = hmac.digest(extracted, info + b"\x01", "sha256")

    assert header.hkdf(secret, salt=salt, info=info) == expanded

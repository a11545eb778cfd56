"""Ciphertexts in the form of Vault transit, read in part."""

import pytest

from kms_api.vault_api import models


@pytest.mark.parametrize("number", [1, 12, 123])
@pytest.mark.parametrize("size", [0, 1, 300, 60_000])
def test_the_header_of_a_ciphertext_of_any_size_is_read(number: int, size: int) -> None:
    """It decides where the call runs, so that many stanzas hold up no other caller."""
    file = b"age-encryption.org/v1\n" + bytes(size)

    found = models.header_of(models.render(number, file))

    assert found == file[: len(found)]
    assert len(found) >= min(len(file), 32 * 1024)


def test_what_is_no_ciphertext_has_no_header() -> None:
    assert models.header_of("vault:v1:!!!!\0") == b""

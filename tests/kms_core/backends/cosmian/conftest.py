"""Doubles of a Cosmian KMS server, and a key on one."""

from collections.abc import Iterator

import pytest

from kms_core.backends.cosmian.backend import CosmianCipher
from support.contract.cosmian_ciphers import ALICE, MALLORY, cipher_of, with_first_version
from support.contract.cosmian_double import CosmianDouble


@pytest.fixture
def double() -> Iterator[CosmianDouble]:
    with CosmianDouble() as made:
        yield made


@pytest.fixture
def cipher(double: CosmianDouble) -> CosmianCipher:
    """A key of the double with its first version."""
    return with_first_version(cipher_of(double))


@pytest.fixture
def two_users() -> Iterator[CosmianDouble]:
    """A server of several users."""
    with CosmianDouble(users={ALICE: "alice", MALLORY: "mallory"}) as made:
        yield made

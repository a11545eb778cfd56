"""Installs and databases that several files share. A test that changes one, or kills it, makes its own."""

from collections.abc import Iterator
from typing import Final

import pytest

from support import pages
from support.credentials import REQUIRED, SecuredService
from support.embedded_valkey import EmbeddedValkey
from support.service import Service

SETTINGS: Final = (
    f"{REQUIRED}failures_per_minute = 1000\n[kms.age]\ndata_keys = true\n"
    "[kms.tenants.acme]\nkeys = ['default', 'pay-*']\n"
    '[kms.keys]\npay-1 = "age://{keys}/private_key.txt?public={keys}/public_key.txt"\n'
)


@pytest.fixture(scope="module")
def module_redis(valkey: EmbeddedValkey, database_numbers: Iterator[int]) -> str:
    """As ``redis_url``, for the installs of one file."""
    return valkey.files.url_of(next(database_numbers))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[Service]:
    """A service for the blocks of pages."""
    with pages.workspace(tmp_path_factory.mktemp("workspace"), module_redis) as service:
        yield service


@pytest.fixture(scope="session")
def secured(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[SecuredService]:
    """An API that asks everybody who they are, for the whole session.

    No worker runs, so that jobs stay queued. Its second key has the files of the first and another id. A test
    that counts what a tenant has uses a tenant of its own.
    """
    folder = tmp_path_factory.mktemp("secured")
    settings = SETTINGS.replace("{keys}", str(folder / "state/age"))
    with SecuredService(folder, settings, valkey.files.url_of(next(database_numbers))) as running:
        yield running.start("api")

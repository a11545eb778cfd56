"""A browser, and a database for the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chromium import Chromium, chromium
from support.embedded_valkey import EmbeddedValkey


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with chromium(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def module_redis(valkey: EmbeddedValkey, database_numbers: Iterator[int]) -> str:
    """The URL of a database for all tests of a file."""
    return valkey.files.url_of(next(database_numbers))

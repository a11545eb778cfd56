"""What several files of the API share."""

from collections.abc import Iterator

import pytest
from anyio.from_thread import start_blocking_portal

from support.authorization.application import Application
from support.embedded_valkey import EmbeddedValkey


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="module")
def application(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Application]:
    """An application that authenticates its callers; no worker runs, so that jobs wait."""
    with start_blocking_portal("asyncio", {"use_uvloop": True}) as portal:
        url = valkey.files.url_of(next(database_numbers))
        made = Application(tmp_path_factory.mktemp("application"), portal, url)
        yield made
        made.close()

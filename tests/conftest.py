"""The real server that tests of jobs run against: one for the session, an empty database for each test."""

import gc
import os
import signal
from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import hypothesis
import pytest
import structlog

from kms_core.settings.redis_urls import for_celery
from support.clock import Clock
from support.embedded_valkey import EmbeddedValkey

# plugins: tests/README.md says what each is for
pytest_plugins = [
    "support.tiers",
    "support.ci_skips",
    "support.cleanup",
    "support.service",
    "support.object_jobs",
    "support.vault_api",
    "support.age_plugin",
    "support.rabbitmq",
    "support.cli.fixtures",
    "support.first_tier",
]


KEPT_VARIABLES: Final = ("KMS_LONG", "KMS_STORM_SEED", "KMS_EXPLORE_EXAMPLES", "KMS_TEST_PICTURES")
DATABASES: Final = 10_000  # tests of one session; an unused one costs nothing


# What differs between shells, CI and users, and what programs that tests start would inherit:
for _number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(_number, signal.SIG_DFL)  # a launcher in the background has them ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.umask(0o022)
for _name in list(os.environ):
    if _name.startswith(("AWS_", "KMS_")) and _name not in KEPT_VARIABLES:
        del os.environ[_name]
hypothesis.settings.load_profile("ci")  # the same examples each time, and no deadline


@pytest.fixture(scope="session", autouse=True)
def _loggers_are_looked_up_anew() -> Iterator[None]:
    """A logger that is kept after its first line would keep the configuration of an earlier test."""
    configure = structlog.configure

    def without_cache(**given: Any) -> None:  # noqa: ANN401 -- as structlog's own
        configure(**given | {"cache_logger_on_first_use": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", without_cache)
        yield


@pytest.fixture(autouse=True)
def _no_configuration_of_logs() -> None:
    """Commands that an earlier test ran in this process may have configured it."""
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A server with the access list of production. Do not kill it: start one of your own for that."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey"), options=("--databases", str(DATABASES))) as server:
        yield server


@pytest.fixture(scope="session")
def database_numbers() -> Iterator[int]:
    return count(1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gc_disabled() -> Iterator[None]:
    """Without garbage collection, for inputs nested without end: it would recurse in their depth."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def redis_database(database_numbers: Iterator[int]) -> int:
    """The number of a database that no test used before; nobody may empty one."""
    return next(database_numbers)


@pytest.fixture
def redis_url(valkey: EmbeddedValkey, redis_database: int) -> str:
    """For redis-py: an empty database. Keys must begin with ``kms:``."""
    return valkey.files.url_of(redis_database)


@pytest.fixture
def broker_url(valkey: EmbeddedValkey, redis_database: int) -> str:
    """For kombu and Celery: the same database as ``redis_url``."""
    return for_celery(valkey.files.url_of(redis_database))

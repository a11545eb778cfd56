"""The golden jobs in an install of this machine: a copy for each test, or one for all that only read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_core.container import Core, build
from kms_core.jobs.store.store import JobStore
from support.embedded_valkey import EmbeddedValkey
from support.golden import install, jobs, manifest, redisdump
from support.service import Service


def _install(folder: Path, redis_url: str) -> Service:
    """An install over a copy of the golden spool, and of Redis as ``_core`` loads it; not started."""
    hook = folder / "hook"
    hook.write_bytes(jobs.HOOK_SECRET)
    hook.chmod(0o600)
    settings = f"[kms.jobs.endpoints.ci]\nurl = 'http://127.0.0.1:9/'\nsecret_file = '{hook}'\n"
    manifest.copied("jobs/spool", folder / "state")
    return install.service(folder, redis_url, settings)


def _core(held: Service) -> Core:
    made = build(held.settings, "test", lambda *_: None)
    redisdump.loaded(made.worker_context.store.redis, jobs.DUMP)
    return made


@pytest.fixture
def held(tmp_path: Path, redis_url: str) -> Service:
    return _install(tmp_path, redis_url)


@pytest.fixture
def core(held: Service) -> Core:
    return _core(held)


@pytest.fixture(scope="module")
def unchanged(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Core:
    """One for all tests that only read."""
    url = valkey.files.url_of(next(database_numbers))
    return _core(_install(tmp_path_factory.mktemp("golden"), url))


@pytest.fixture(scope="module")
def store(unchanged: Core) -> JobStore:
    return unchanged.worker_context.store

"""A core whose leases last, the root of its file jobs, its job store, and an endpoint for webhooks."""

from pathlib import Path

import pytest

from kms_core.container import Core
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.store.store import JobStore
from support.job_stores import LASTING_LEASES, store_of
from support.webhooks import endpoint


@pytest.fixture
def core(core: Core) -> Core:
    """Its leases outlast a test on a slow machine, and three attempts are made."""
    core.worker_context.store.rules = LASTING_LEASES.jobs
    return core


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The root of file jobs of ``core``."""
    return tmp_path / "state" / "files"


@pytest.fixture
def store(core: Core) -> JobStore:
    """The store of ``core``, with leases that last; it wakes nobody."""
    return store_of(core, LASTING_LEASES)


@pytest.fixture
def webhook_endpoint(tmp_path: Path) -> WebhookEndpoint:
    """Nothing is sent here."""
    return endpoint(tmp_path, "https://hooks.invalid/", None)

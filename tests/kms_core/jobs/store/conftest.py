"""The job store that tests of this folder ask."""

import pytest

from kms_core.container import Core
from kms_core.jobs.store.store import JobStore
from support.job_stores import LONG, store_of


@pytest.fixture
def store(core: Core) -> JobStore:
    """The store of ``core``, with leases that last; it wakes nobody."""
    return store_of(core, LONG)

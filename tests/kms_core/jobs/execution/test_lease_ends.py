"""The end of a lease: what renews the leases of a process lets go of it."""

import os

from kms_core.container import Core
from kms_core.jobs.execution import lease
from kms_core.jobs.execution.lease import Chore, Lease, Renewed
from support.job_stores import claimed, store_of, with_jobs


def is_renewed(one: Renewed) -> bool:
    return one in lease._pacemaker(os.getpid())._due  # noqa: SLF001 -- its effect takes seconds to see


def test_nothing_is_renewed_after_its_block(core: Core) -> None:
    """It would count as stalled in the end, and end its process."""
    store = store_of(core, with_jobs())
    for one in (Lease(store, claimed(store)), Chore(store, "job")):
        with one:
            assert is_renewed(one)

        assert not is_renewed(one)

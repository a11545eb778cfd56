"""The services that work on jobs uses."""

from dataclasses import dataclass

from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store.store import JobStore
from kms_core.service import Kms


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The services that a worker uses."""

    kms: Kms
    store: JobStore
    spool: Spool
    places: Locations

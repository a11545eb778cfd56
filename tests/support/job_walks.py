"""Jobs, settings and short sequences of calls for the job store beside its model."""

from collections.abc import Sequence
from typing import Final

import msgspec

from kms_core.jobs.spec import BULK, FILES, MAINTENANCE
from kms_core.settings.model import TenantSection
from kms_protocol.wire import JobState
from support import job_model
from support.job_stores import with_jobs

TENANTS: Final = ("a", "b")
SECTION: Final = msgspec.structs.replace(
    with_jobs(
        lease_s=job_model.LEASE_S,
        attempts=job_model.ATTEMPTS,
        open_jobs=job_model.OPEN_JOBS,
        tenant_leases=job_model.TENANT_LEASES,
        result_ttl_s=job_model.KEPT_S,
        input_grace_s=job_model.INPUT_GRACE_S,
    ),
    tenants={
        name: TenantSection(open_jobs=job_model.TENANT_JOBS, spool_bytes=job_model.TENANT_BYTES)
        for name in TENANTS
    },
)
FORMS: Final[dict[str, dict[str, object]]] = {
    "upload": {"source": "upload", "size_bytes": 40},
    "items": {"source": "items", "items": 2, "starts": (0, 1), "size_bytes": 40},
    "file": {"source": "file:///a", "target": "file:///b"},
}
TERMS: Final = ((8, 8, 0), (25, 40, 0), (60, 60, 15), (12, 200, 0), (200, 200, 500))
"""Seconds from a submission until its job must start and end, and for which its result is kept."""
SERVED: Final = ((BULK, FILES, MAINTENANCE), (FILES, BULK), (BULK,), (FILES,))
ENDS: Final[Sequence[tuple[JobState, str]]] = (
    ("succeeded", ""),
    ("failed", "items_failed"),
    ("failed", "decrypt_failed"),
    ("failed", "record_refused"),
    ("cancelled", "cancelled"),
)
STEPS: Final[dict[str, tuple[str, tuple[object, ...]]]] = {
    "take": ("take_any", ("w1/1",)),
    "claim": ("claim", (0, "w2/1")),
    "claim-third": ("claim", (2, "w2/1")),
    "renew": ("renew", (0,)),
    "commit": ("commit", (0, 1)),
    "succeed": ("finish", (0, ENDS[0], ())),
    "fail": ("finish", (0, ENDS[2], ())),
    "refuse": ("finish", (0, ENDS[3], ())),
    "stop": ("finish", (0, ENDS[4], ())),
    "defer": ("defer", (0, 15)),
    "stall": ("stall", (0,)),
    "step": ("step", (0, "x")),
    "split": ("split", (0,)),
    "end-parent": ("end_parent", (0,)),
    "cancel": ("cancel", (0, "own")),
    "retry": ("retry", (0, "own")),
    "release": ("release", (0, "own")),
    "soon": ("pass_time", (6,)),
    "wait": ("pass_time", (10,)),
    "reap": ("reap", ()),
    "clean": ("clean", ()),
}
"""The calls of a word of a walk: a method of ``StoreMachine``, and what it is given."""
WALKS: Final = (
    (TERMS[0], "file soon take soon reap"),
    (TERMS[0], "file take wait commit claim"),
    (TERMS[0], "items take split take wait step reap step"),
    (TERMS[0], "items take split wait claim-third"),
    (TERMS[0], "items take split cancel wait claim-third"),
    (TERMS[0], "items take split cancel wait reap"),
    (TERMS[1], "file take wait wait wait wait claim"),
    (TERMS[1], "file take cancel defer wait wait reap wait wait reap"),
    (TERMS[2], "upload take succeed wait wait clean wait wait wait wait clean"),
    (TERMS[3], "file file file"),
    (TERMS[3], "upload take commit renew succeed"),
    (TERMS[3], "file take commit fail"),
    (TERMS[3], "file take refuse retry release take refuse release"),
    (TERMS[3], "file take refuse file take refuse retry retry file file file"),
    (TERMS[3], "file take commit refuse"),
    (TERMS[3], "file take commit wait reap stop"),
    (TERMS[3], "file take wait claim wait claim"),
    (TERMS[3], "file take wait reap take wait reap take"),
    (TERMS[3], "file take cancel soon renew commit succeed"),
    (TERMS[3], "file take cancel refuse"),
    (TERMS[3], "file take cancel stop"),
    (TERMS[3], "file take cancel wait claim"),
    (TERMS[3], "file take cancel defer cancel"),
    (TERMS[4], "items take cancel split stall"),
    (TERMS[4], "items take split take succeed take succeed end-parent"),
    (TERMS[4], "items take split take cancel step stall"),
    (TERMS[4], "items take split take cancel wait claim claim end-parent"),
    (TERMS[4], "items take split take succeed take succeed wait reap"),
    (TERMS[4], "items take split take cancel succeed claim wait reap"),
    (TERMS[4], "items take split take step wait reap take step"),
    (TERMS[4], "items take split take wait reap take fail take fail end-parent"),
)
"""What is rarely reached by chance. Sequences that are drawn begin with the first words of one."""

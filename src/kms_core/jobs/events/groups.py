"""Groups of jobs: counted for their submitter, and told once all jobs have ended.

The number of jobs is in the sealed record of each. So write access to Redis can hide jobs, and then the group
does not end; it cannot have a group told as ended with fewer jobs, or with other ends than were signed.
"""

from collections import Counter
from typing import Final

from kms_core.jobs.store.store import JobStore
from kms_protocol import job_groups

_MOST_FAILED: Final = 10


def group_of(store: JobStore, tenant: str, name: str) -> job_groups.GroupOut:
    """A group of a tenant, from the verified states of its jobs. Raises UnknownJob, JobsUnavailable."""
    jobs = store.group(tenant, name)
    most = max(job.accepted.group_jobs for job in jobs if job.accepted)
    return job_groups.GroupOut(
        name=name,
        jobs=most,
        submitted=len(jobs),
        states=dict(Counter(job.state for job in jobs)),
        ended=len(jobs) >= most and all(job.ended for job in jobs),
        failed=[job.job_id for job in jobs if job.ended and job.state != "succeeded"][:_MOST_FAILED],
    )

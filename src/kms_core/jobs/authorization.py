"""Job authorization, checked at submission and again when the job runs.

A batch is asked for once as a whole. The core asks once more for each file and item, then with the key and
context that these really have.
"""

from kms_core.auth.policy import Principal, allows
from kms_core.jobs.spec import MOVING, ItemsJob, JobSpec
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden
from kms_protocol.wire import JobIn, JobKind

_ANY_CONTEXT = Context()  # fits no scope that has a rule on contexts


def check_job(kms: Kms, job: JobSpec) -> None:
    """Raise as ``check`` if its submitter may not run the job."""
    context = None if isinstance(job, ItemsJob) else job.bound_context
    check(kms, job.who, job, context, job.new_bound_context)


def check(
    kms: Kms, who: Principal, job: JobSpec | JobIn, context: Context | None, new_context: Context | None
) -> None:
    """Raise Forbidden or UnknownKey if the job would be refused; Unavailable if that cannot be decided now.

    ``context`` None: each item may bring its own, so it is not asked for yet. Files name the key that opens
    them, so that of a decrypt job may not be known yet.
    """
    kind, key_id = job.kind, job.key_id
    if kind == "encrypt":
        kms.require(who, "encrypt", key_id or kms.keyring.default.key_id, context)
    elif kind == "decrypt":
        kms.require(who, "decrypt", key_id, context)
    elif new_context is not None or not allows(kms.policy, who, kind, key_id, context):
        # away from its key or context, or without the right to move what it cannot open
        kms.require(who, "decrypt", None, context)
        kms.require(who, "encrypt", key_id, new_context or context)


def check_batch(kms: Kms, who: Principal, kind: JobKind) -> None:
    """Raise Forbidden, recorded once, if no scope of the caller allows the operation with any key.

    Asked before the first item of a batch: the items would only be denied and recorded one by one.
    Unavailable if it cannot be decided now.
    """
    moves = kind in MOVING and not allows(kms.policy, who, kind)
    try:
        for operation in ("decrypt", "encrypt") if moves else (kind,):
            kms.policy.require(who, operation)
    except Forbidden as exc:
        kms.raise_recorded(who, kind, Context(), exc)


def check_reader(kms: Kms, who: Principal, job: JobSpec) -> None:
    """Results are for their submitter, and for those of the tenant who could have run the job themselves.

    A token that has the name of a revoked one is not its submitter. Contexts and keys that only its items or
    files name must be allowed for any value.
    """
    is_other_token = who.credential.startswith("token:") and who.credential != job.credential
    if who.name == job.principal and not is_other_token:
        return
    context = _ANY_CONTEXT if isinstance(job, ItemsJob) else job.bound_context
    key_id = job.key_id or (kms.keyring.default.key_id if job.kind == "encrypt" else "")
    kms.require(who, job.kind, key_id, context)

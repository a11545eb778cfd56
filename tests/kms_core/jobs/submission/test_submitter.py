"""An upload that is none: it is refused, and nothing of it is left."""

import pytest

from kms_core.container import Core
from kms_protocol.errors import InvalidRequest, NotACiphertext
from kms_protocol.wire import JobKind
from support.core_jobs import CONTEXT, WHO
from support.job_options import job_options
from support.job_stores import TENANT, spool_folder


@pytest.mark.parametrize("size", [5, 500_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("kind", "missing", "error"), [("encrypt", 1, InvalidRequest), ("decrypt", 0, NotACiphertext)]
)
def test_an_upload_that_is_cut_or_no_ciphertext_leaves_nothing(
    core: Core, kind: JobKind, missing: int, error: type[Exception], size: int
) -> None:
    receiving = core.submitter.receive_upload(job_options(WHO, kind, CONTEXT), size + missing)
    next(receiving)

    with pytest.raises(error):
        receiving.send((memoryview(bytes(size)), False))
    assert core.worker_context.store.redis.zcard(f"kms:tenant:{TENANT}") == 0
    assert {path.name for path in spool_folder(core).iterdir()} <= {"hosts"}

"""Who may submit a job, and who may read its result."""

from contextlib import nullcontext
from pathlib import Path
from typing import Final

import pytest

from kms_core import scopes
from kms_core.age import x25519
from kms_core.auth.policy import ByScopes, Principal
from kms_core.jobs import authorization
from kms_core.jobs.spec import UploadJob
from kms_core.scopes import Scope
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden
from kms_protocol.wire import JobIn
from support.age_kms import age_backend, kms_over

SCOPES: Final = {
    "root": "jobs:read,decrypt",
    "mover": "reseal",
    "owner": "encrypt,decrypt",
    "opener": "decrypt",
    "sealer": "encrypt",
}


def scopes_of(who: Principal) -> list[Scope]:
    """Those of some callers; others read jobs."""
    return [scopes.parse(SCOPES.get(who.name, "jobs:read"))]


@pytest.fixture
def kms(tmp_path: Path) -> Kms:
    backend = age_backend(tmp_path, x25519.X25519Identity.generate())
    return kms_over(backend, policy=ByScopes(scopes_of, {}))


def job(credential: str) -> UploadJob:
    return UploadJob(
        job_id="1",
        tenant="acme",
        principal="ada",
        credential=credential,
        kind="decrypt",
        created_at=0.0,
        expires_at=0.0,
        start_by=0.0,
        run_by=0.0,
    )


@pytest.mark.parametrize(
    ("made_with", "asked_with"),
    [
        ("token:abc", "token:abc"),
        ("jwt:corp:0123", "jwt:corp:4567"),  # which changes with each login
        ("cert:ada:1:f0", "cert:ada:2:f0"),
        ("none", "none"),
    ],
)
def test_a_submitter_reads_the_result(kms: Kms, made_with: str, asked_with: str) -> None:
    authorization.check_reader(kms, Principal("ada", "acme", asked_with), job(made_with))


def test_a_token_with_the_name_of_another_one_is_not_the_submitter(kms: Kms) -> None:
    with pytest.raises(Forbidden):
        authorization.check_reader(kms, Principal("ada", "acme", "token:def"), job("token:abc"))


def test_a_caller_who_could_have_run_the_job_reads_the_result(kms: Kms) -> None:
    authorization.check_reader(kms, Principal("root", "acme", "token:root"), job("token:abc"))


@pytest.mark.parametrize("new_context", [None, Context.parse("row=8")])
def test_a_move_to_another_context_needs_the_rights_to_open_and_to_seal(
    kms: Kms, new_context: Context | None
) -> None:
    asked, context = JobIn(kind="reseal"), Context.parse("row=7")
    may = {"owner", "mover"} if new_context is None else {"owner"}
    for name in ("owner", "mover", "opener", "sealer"):
        with nullcontext() if name in may else pytest.raises(Forbidden):
            authorization.check(kms, Principal(name, "acme", f"token:{name}"), asked, context, new_context)

"""Jobs run as their submitter and are checked again when they run: what was revoked meanwhile stops."""

import itertools
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, cast

import msgspec
import pytest

from kms_core.auth import tokens
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.tokens import Token
from kms_core.container import Core, build_intake
from kms_core.jobs.submission import celery_intake
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden, KmsError, RateLimited, SpoolQuota, Unauthenticated, UnknownKey
from kms_protocol.units import GiB
from support.celery_messages import body as submission
from support.celery_messages import seal
from support.core_jobs import run_job
from support.credentials import REQUIRED, Issuer, SecuredService, bearer, required_with_issuer
from support.job_options import job_options
from support.job_stores import accepted, remove_inputs
from support.service import CANARY, b64, check_problem, core_of

ITEMS: Final = [wire.JobItem(plaintext=b"one"), wire.JobItem(plaintext=b"two", context="row=2")]


@pytest.fixture
def install(tmp_path: Path, redis_url: str) -> SecuredService:
    """An install without processes: a worker is a call."""
    return SecuredService(
        tmp_path,
        f"{REQUIRED}[kms.tenants.small]\nopen_jobs = 2\n[kms.tenants.narrow]\nspool_bytes = 150\n",
        redis_url,
    )


@pytest.fixture
def core(install: SecuredService) -> Core:
    return core_of(install)


def caller(install: SecuredService, *scopes: str, tenant: str = "default") -> Principal:
    token, _ = install.new_token(*scopes, tenant=tenant)
    return Principal(token.name, token.tenant, f"token:{token.id}")


def edit(install: SecuredService, who: Principal, **changes: object) -> None:
    """What an operator may do to a token; ``scopes``, ``expires_at``."""

    def changed(token: Token) -> Token:
        return msgspec.structs.replace(token, **changes) if who.credential == f"token:{token.id}" else token

    made = [changed(token) for token in tokens.read(install.token_file).tokens]
    install.token_file.write_bytes(msgspec.json.encode({"version": 1, "tokens": made}))


def bulk(core: Core, who: Principal, items: list[wire.JobItem] | None = None, context: str = "row=1") -> str:
    return core.submitter.items(job_options(who, "encrypt", context), items or ITEMS).job_id


def end(core: Core, job_id: str, tenant: str = "default") -> tuple[str, str]:
    run_job(job_id, core.worker_context, "w")
    job = core.worker_context.store.get(job_id, tenant)
    return job.state, job.error


# -- queued jobs -------------------------------------------------------------------------------------------


def test_a_job_runs_as_its_submitter(install: SecuredService, core: Core) -> None:
    job_id = bulk(core, caller(install, "jobs:write,encrypt context=row=*"))

    assert end(core, job_id) == ("succeeded", "")


Change = Callable[[SecuredService, Principal], None]


def to(**changes: object) -> Change:
    return lambda install, who: edit(install, who, **changes)


def revoke(install: SecuredService, who: Principal) -> None:
    tokens.revoke(install.token_file, who.credential.removeprefix("token:"))


CREDENTIAL_CHANGES: Final[dict[str, tuple[Change, str]]] = {
    "revoked": (revoke, "forbidden"),
    "expired": (to(expires_at=datetime.now(UTC) - timedelta(seconds=1)), "forbidden"),
    "another operation": (to(scopes=["jobs:write"]), "forbidden"),
    "another key": (to(scopes=["jobs:write,encrypt key=other"]), "unknown_key"),
    "nothing": (to(scopes=[]), "forbidden"),
    "another tenant": (to(tenant="other"), "forbidden"),
}


@pytest.mark.parametrize(("change", "code"), CREDENTIAL_CHANGES.values(), ids=CREDENTIAL_CHANGES)
def test_a_queued_job_is_held_to_what_its_token_is_worth_now(
    install: SecuredService, core: Core, change: Change, code: str
) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    change(install, who)

    assert end(core, job_id) == ("failed", code)
    remove_inputs(core)
    assert not install.spooled()


def test_parts_of_a_job_stop_when_its_token_is_revoked(install: SecuredService, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who, [wire.JobItem(plaintext=b"x")] * 501)
    run_job(job_id, core.worker_context, "w")  # splits it
    revoke(install, who)
    run_due(core)

    assert core.worker_context.store.get(job_id, "default").error == "items_failed"
    assert core.worker_context.store.get(job_id, "default").items_failed == 501


def run_due(core: Core) -> None:
    """What a caretaker would have workers do."""
    for job_id in cast("list[bytes]", core.worker_context.store.redis.zrange("kms:open", 0, -1)):
        run_job(job_id.decode(), core.worker_context, "w")


def test_a_retried_dead_letter_is_checked_as_any(install: SecuredService, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    core.worker_context.store.redis.hset(f"kms:job:{job_id}", "attempt", 99)
    run_job(job_id, core.worker_context, "w")
    assert core.worker_context.store.get(job_id, "default").error == "attempts_exhausted"
    revoke(install, who)
    core.worker_context.store.retry(job_id, "default")

    assert end(core, job_id) == ("failed", "forbidden")


def test_a_token_file_that_cannot_be_read_costs_a_job_time_and_nothing_else(
    install: SecuredService, core: Core
) -> None:
    job_id = bulk(core, caller(install, "jobs:write,encrypt"))
    good = install.token_file.read_bytes()
    for damage in (b"{", None):
        install.token_file.unlink()
        if damage is not None:
            install.token_file.write_bytes(damage)
        run_job(job_id, core.worker_context, "w")
        assert core.worker_context.store.get(job_id, "default").state == "queued"
        core.worker_context.store.redis.hset(f"kms:job:{job_id}", "not_before", 0)
        install.token_file.write_bytes(good)

    assert end(core, job_id) == ("succeeded", "")


def test_a_job_of_the_time_before_authentication_is_nobodys(install: SecuredService, core: Core) -> None:
    open_to_all = SecuredService(install.state.parent / "open", "", install.environ["KMS_REDIS_URL"])
    settings = (
        f'[kms.jobs]\nspool_identity_path = "{install.state}/spool.key"\nspool_dir = "{install.spool}"\n'
    )
    open_to_all.config.write_text(settings)
    job_id = bulk(core_of(open_to_all), Principal("local"))

    assert end(core, job_id) == ("failed", "forbidden")


# -- items -------------------------------------------------------------------------------------------------


def test_each_item_is_held_to_its_own_context(install: SecuredService, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt context=row=1")
    job_id = bulk(core, who)

    assert end(core, job_id) == ("failed", "items_failed")
    job = core.worker_context.store.get(job_id, "default")
    assert (job.items_done, job.items_failed) == (2, 1)


# -- JWTs --------------------------------------------------------------------------------------------------


def granted(*scopes: str) -> Principal:
    """A holder of a JWT, as a request with it is."""
    return Principal("corp:ada", "default", "jwt:corp:00", Grant(scopes, time.time() + 60))


@pytest.fixture
def trusting(tmp_path: Path, redis_url: str) -> SecuredService:
    """An install that trusts an issuer ``corp``."""
    (tmp_path / "jwks.json").write_bytes(Issuer().jwks)
    return SecuredService(tmp_path, required_with_issuer(f'jwks_file = "{tmp_path}/jwks.json"'), redis_url)


def test_a_job_of_a_jwt_runs_with_the_scopes_of_its_acceptance(trusting: SecuredService) -> None:
    core = core_of(trusting)
    job_id = bulk(core, granted("jobs:write", "encrypt"))
    assert core.worker_context.store.accepted(job_id).scopes == ("jobs:write", "encrypt")

    assert end(core, job_id) == ("succeeded", "")


# -- files: read and write apart ----------------------------------------------------------------------------


def reference(core: Core, who: Principal, source: Path, target: Path) -> str:
    terms = job_options(who, "encrypt", "a=b", source=f"file://{source}", target=f"file://{target}")
    return core.submitter.files(terms).job_id


@pytest.fixture
def files(install: SecuredService) -> Path:
    for name in ("in", "out", "other"):
        (install.files / name).mkdir()
        (install.files / name / "plain").write_bytes(CANARY.encode())
    return install.files


@pytest.mark.parametrize(
    "scopes",
    [
        ["jobs:write,encrypt"],
        ["jobs:write,encrypt key=default", "decrypt read=file:///{0}/in/ write=file:///{0}/out/"],
        ["jobs:write,encrypt read=file:///{0}/in/", "encrypt write=file:///{0}/out/"],
        ["encrypt key=other read=file:///{0}/in/ write=file:///{0}/out/", "encrypt key=default"],
        ["encrypt context=a=c read=file:///{0}/in/ write=file:///{0}/out/", "encrypt context=a=b"],
    ],
    ids=["no prefix", "other operation", "two scopes", "other key", "other context"],
)
def test_one_scope_must_cover_operation_key_context_and_both_files(
    install: SecuredService, core: Core, files: Path, scopes: list[str]
) -> None:
    who = caller(install, *(line.replace("/{0}", str(files)) for line in scopes))

    with pytest.raises(KmsError) as caught:
        reference(core, who, files / "in/plain", files / "out/sealed")
    assert isinstance(caught.value, Forbidden | UnknownKey)
    assert str(files) not in caught.value.detail


def test_files_are_asked_for_again_when_the_job_runs(
    install: SecuredService, core: Core, files: Path
) -> None:
    who = caller(install, f"jobs:write,encrypt read=file://{files}/ write=file://{files}/")
    job_id = reference(core, who, files / "in/plain", files / "out/sealed")
    edit(install, who, scopes=[f"jobs:write,encrypt read=file://{files}/in/ write=file://{files}/in/"])

    assert end(core, job_id) == ("failed", "forbidden")
    assert not (files / "out/sealed").exists()


def test_the_key_of_a_file_must_be_in_the_scope_that_names_the_files(
    install: SecuredService, core: Core, files: Path
) -> None:
    """What opens a file is known only when it has been opened: then all rules are asked for together."""
    sealed = core.kms.encrypt(caller(install, "encrypt"), b"x", Context.parse("a=b")).ciphertext
    (files / "in/sealed").write_bytes(sealed)
    who = caller(
        install,
        f"decrypt key=other read=file://{files}/ write=file://{files}/",
        "decrypt key=default",
        "jobs:write",
    )
    source, target = f"file://{files}/in/sealed", f"file://{files}/out/plain-again"
    terms = job_options(who, "decrypt", "a=b", source=source, target=target)
    job_id = core.submitter.files(terms).job_id

    assert end(core, job_id)[0] == "failed"
    assert not (files / "out/plain-again").exists()


# -- results -----------------------------------------------------------------------------------------------


def test_results_are_for_their_submitter_and_for_who_could_have_made_them(secured: SecuredService) -> None:
    asked = {"plaintext": b64(CANARY.encode()), "context": "a=b"}
    sealed = secured.post("/encrypt", asked, headers=secured.token_header("encrypt")).json()["ciphertext"]
    mine = secured.token_header("jobs:read,jobs:write,decrypt context=a=b")
    job = {"kind": "decrypt", "items": [{"ciphertext": sealed}], "context": "a=b"}
    job_id = secured.post("/jobs", job, headers=mine).json()["job_id"]
    run_job(job_id, core_of(secured).worker_context, "w")
    path = f"/jobs/{job_id}/result"

    assert json.loads(secured.get(path, headers=mine).content)["plaintext"] == b64(CANARY.encode())
    assert secured.get(path, headers=secured.token_header("jobs:read,decrypt")).status_code == 200
    for scopes in (
        "jobs:read",
        "jobs:read,encrypt",
        "jobs:read,decrypt context=a=b",
        "jobs:read,decrypt key=default",
    ):
        answer = secured.get(path, headers=secured.token_header(scopes))
        assert answer.status_code in {403, 404}, scopes
        assert CANARY not in answer.text
        assert b64(CANARY.encode()) not in answer.text


# -- messages without HTTP ---------------------------------------------------------------------------------


def taken(service: SecuredService, asked: dict[str, object]) -> str:
    """The id of the job of a message, as the intake of a worker takes it."""
    intake = build_intake(service.settings, core_of(service).submitter)
    assert intake
    recipient = celery_intake.recipient(service.settings.kms.jobs.intake_identity_path)
    return intake.accept(seal(str(recipient), asked), "w")


def test_a_message_carries_a_token_and_its_job_is_the_holders(secured: SecuredService) -> None:
    token, text = secured.new_token("jobs:read,jobs:write,encrypt", tenant="sender")
    job_id = taken(secured, submission(token=text))
    run_job(job_id, core_of(secured).worker_context, "w")

    assert secured.get(f"/jobs/{job_id}", headers=bearer(text)).json()["state"] == "succeeded"
    stranger = secured.get(f"/jobs/{job_id}", headers=secured.token_header("jobs:read"))
    check_problem(stranger, 404, "unknown_job")
    reader = secured.token_header("audit:read", tenant="sender")
    events = secured.get("/audit", params={"job_id": job_id}, headers=reader).json()["events"]
    assert {event["principal"] for event in events} == {token.name}


@pytest.mark.parametrize("kind", ["null", "empty", "odd", "revoked", "weak"])
def test_a_message_without_a_good_token_is_refused(install: SecuredService, kind: str) -> None:
    _, revoked = install.new_token("jobs:write,encrypt")
    tokens.revoke(install.token_file, revoked[4:14])
    shown = {
        "null": None,
        "empty": "",
        "odd": "x",
        "revoked": revoked,
        "weak": install.new_token("encrypt")[1],
    }

    with pytest.raises(Forbidden if kind == "weak" else Unauthenticated):
        taken(install, submission(token=shown[kind]))


# -- quotas ------------------------------------------------------------------------------------------------

SMALL: Final = [wire.JobItem(plaintext=b"x")]
THIRTY: Final = [wire.JobItem(plaintext=bytes(30))]


def test_a_tenant_has_so_many_open_jobs_and_room_again_when_one_ends(
    install: SecuredService, core: Core
) -> None:
    small, other = caller(install, "*", tenant="small"), caller(install, "*")
    first, _ = (bulk(core, small, SMALL) for _ in range(2))
    with pytest.raises(RateLimited, match="open jobs") as caught:
        bulk(core, small, SMALL)
    assert caught.value.retry_after_s > 0
    assert len(install.spooled()) == 2 * 2
    bulk(core, other)
    assert end(core, first, "small") == ("succeeded", "")

    bulk(core, small, SMALL)


def test_a_tenant_has_so_much_of_the_spool_until_results_expire(install: SecuredService, core: Core) -> None:
    narrow = caller(install, "*", tenant="narrow")
    job_id = bulk(core, narrow, THIRTY)
    with pytest.raises(SpoolQuota, match="in the spool"):
        bulk(core, narrow, THIRTY)
    end(core, job_id, "narrow")
    with pytest.raises(SpoolQuota, match="in the spool"):
        bulk(core, narrow, THIRTY)
    bulk(core, caller(install, "*"), [wire.JobItem(plaintext=bytes(3000))])
    core.worker_context.store.purged(job_id)

    bulk(core, narrow, THIRTY)


def test_items_above_the_quota_are_refused_while_they_arrive(install: SecuredService, core: Core) -> None:
    """Not once they are in the spool: a stream of items has no end that is known beforehand."""
    taken = itertools.count()
    items = (wire.JobItem(plaintext=bytes(30)) for _ in zip(range(1000), taken, strict=False))
    terms = job_options(caller(install, "*", tenant="narrow"), "encrypt", "row=1")
    with pytest.raises(SpoolQuota, match="in the spool"):
        core.submitter.items(terms, items)

    assert next(taken) < 10
    assert install.spooled() == []


def test_an_upload_above_the_quota_is_refused_while_it_arrives(install: SecuredService, core: Core) -> None:
    """Or before, if it tells its size."""
    terms = job_options(caller(install, "*", tenant="narrow"), "encrypt", "row=1")
    with pytest.raises(SpoolQuota, match="in the spool"):
        next(core.submitter.receive_upload(terms, 151))
    receiving = core.submitter.receive_upload(terms, 0)
    next(receiving)
    receiving.send((memoryview(bytes(150)), True))
    with pytest.raises(SpoolQuota, match="in the spool"):
        receiving.send((memoryview(bytes(1)), True))

    assert install.spooled() == []


def test_submissions_at_once_are_counted_one_by_one(install: SecuredService, core: Core) -> None:
    """What looked at the room before another took it is told so by the store."""
    store = core.worker_context.store
    store.submit(accepted(tenant="narrow", size_bytes=100))
    with pytest.raises(SpoolQuota, match="in the spool"):
        store.submit(accepted(tenant="narrow", size_bytes=51))
    store.submit(accepted(tenant="narrow", size_bytes=100, source="file:///a", target="file:///b"))
    assert store.spool_room("narrow") == 50

    store.submit(accepted(tenant="narrow", size_bytes=50))
    assert store.spool_room("narrow") == 0
    assert store.spool_room("default") == 5 * GiB  # without a quota half of the spool
    assert install.spooled() == []


def test_a_job_that_was_cancelled_or_failed_frees_the_spool(install: SecuredService, core: Core) -> None:
    narrow = caller(install, "*", tenant="narrow")
    core.worker_context.store.cancel(bulk(core, narrow, THIRTY), "narrow")
    remove_inputs(core)
    job_id = bulk(core, narrow, THIRTY)
    edit(install, narrow, scopes=["jobs:write"])
    assert end(core, job_id, "narrow") == ("failed", "forbidden")
    remove_inputs(core)
    edit(install, narrow, scopes=["*"])

    bulk(core, narrow, THIRTY)

"""Jobs run as their submitter and are checked again when they run: what was revoked meanwhile stops."""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, cast

import msgspec
import pytest

from kms_core.auth import tokens
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.tokens import Token
from kms_core.container import Core, build_intake
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.submission import celery_intake
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import (
    Forbidden,
    IdempotencyConflict,
    KmsError,
    RateLimited,
    SpoolQuota,
    Unauthenticated,
    UnknownKey,
)
from kms_protocol.wire import JobKind
from support.celery_messages import body as submission
from support.celery_messages import seal, send
from support.credentials import ISSUER, REQUIRED, Guarded, Issuer, bearer, issuer_settings
from support.embedded_valkey import EmbeddedValkey
from support.job_stores import accepted, remove_inputs
from support.service import CANARY, b64, check_problem, core_of
from support.waiting import until

ITEMS: Final = [wire.JobItem(plaintext=b"one"), wire.JobItem(plaintext=b"two", context="row=2")]


@pytest.fixture
def install(tmp_path: Path, redis_url: str) -> Guarded:
    """An install without processes: a worker is a call."""
    return Guarded(
        tmp_path,
        f"{REQUIRED}[kms.tenants.small]\nopen_jobs = 2\n[kms.tenants.narrow]\nspool_bytes = 150\n",
        redis_url,
    )


@pytest.fixture
def core(install: Guarded) -> Core:
    return core_of(install)


def caller(install: Guarded, *scopes: str, tenant: str = "default") -> Principal:
    token, _ = install.make(*scopes, tenant=tenant)
    return Principal(token.name, token.tenant, f"token:{token.id}")


def edit(install: Guarded, who: Principal, **changes: object) -> None:
    """What an operator may do to a token; ``scopes``, ``expires_at``."""

    def changed(token: Token) -> Token:
        return msgspec.structs.replace(token, **changes) if who.credential == f"token:{token.id}" else token

    made = [changed(token) for token in tokens.read(install.token_file).tokens]
    install.token_file.write_bytes(msgspec.json.encode({"version": 1, "tokens": made}))


def bulk(core: Core, who: Principal, items: list[wire.JobItem] | None = None, context: str = "row=1") -> str:
    return core.submitter.items(
        SubmissionOptions(who, "encrypt", Context.parse(context)), items or ITEMS
    ).job_id


def end(core: Core, job_id: str, tenant: str = "default") -> tuple[str, str]:
    run_job(job_id, core.worker_context, "w")
    job = core.worker_context.store.get(job_id, tenant)
    return job.state, job.error


# -- queued jobs -------------------------------------------------------------------------------------------


def test_a_job_runs_as_its_submitter(install: Guarded, core: Core) -> None:
    job_id = bulk(core, caller(install, "jobs:write,encrypt context=row=*"))

    assert end(core, job_id) == ("succeeded", "")


def test_a_queued_job_of_a_revoked_token_ends_as_forbidden(install: Guarded, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    tokens.revoke(install.token_file, who.credential.removeprefix("token:"))

    assert end(core, job_id) == ("failed", "forbidden")
    remove_inputs(core)
    assert not install.spooled()


def test_a_queued_job_of_an_expired_token_ends_as_forbidden(install: Guarded, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    edit(install, who, expires_at=datetime.now(UTC) - timedelta(seconds=1))

    assert end(core, job_id) == ("failed", "forbidden")


@pytest.mark.parametrize(
    ("scopes", "code"),
    [(["jobs:write"], "forbidden"), (["jobs:write,encrypt key=other"], "unknown_key"), ([], "forbidden")],
    ids=["operation", "key", "nothing"],
)
def test_a_queued_job_is_held_to_what_its_token_may_do_now(
    install: Guarded, core: Core, scopes: list[str], code: str
) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    edit(install, who, scopes=scopes)

    assert end(core, job_id) == ("failed", code)


def test_a_token_of_another_tenant_is_not_that_of_the_job(install: Guarded, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    edit(install, who, tenant="other")

    assert end(core, job_id) == ("failed", "forbidden")


def test_parts_of_a_job_stop_when_its_token_is_revoked(install: Guarded, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who, [wire.JobItem(plaintext=b"x")] * 501)
    run_job(job_id, core.worker_context, "w")  # splits it
    tokens.revoke(install.token_file, who.credential.removeprefix("token:"))
    run_due(core)

    assert core.worker_context.store.get(job_id, "default").error == "items_failed"
    assert core.worker_context.store.get(job_id, "default").items_failed == 501


def run_due(core: Core) -> None:
    """What a caretaker would have workers do."""
    for job_id in cast("list[bytes]", core.worker_context.store.redis.zrange("kms:open", 0, -1)):
        run_job(job_id.decode(), core.worker_context, "w")


def test_a_retried_dead_letter_is_checked_as_any(install: Guarded, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt")
    job_id = bulk(core, who)
    core.worker_context.store.redis.hset(f"kms:job:{job_id}", "attempt", 99)
    run_job(job_id, core.worker_context, "w")
    assert core.worker_context.store.get(job_id, "default").error == "attempts_exhausted"
    tokens.revoke(install.token_file, who.credential.removeprefix("token:"))
    core.worker_context.store.retry(job_id, "default")

    assert end(core, job_id) == ("failed", "forbidden")


def test_a_token_file_that_cannot_be_read_costs_a_job_time_and_nothing_else(
    install: Guarded, core: Core
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


def test_a_job_of_the_time_before_authentication_is_nobodys(install: Guarded, core: Core) -> None:
    open_to_all = Guarded(install.state.parent / "open", "", install.environ["KMS_REDIS_URL"])
    settings = (
        f'[kms.jobs]\nspool_identity_path = "{install.state}/spool.key"\nspool_dir = "{install.spool}"\n'
    )
    open_to_all.config.write_text(settings)
    job_id = bulk(core_of(open_to_all), Principal("local"))

    assert end(core, job_id) == ("failed", "forbidden")


# -- items -------------------------------------------------------------------------------------------------


def test_each_item_is_held_to_its_own_context(install: Guarded, core: Core) -> None:
    who = caller(install, "jobs:write,encrypt context=row=1")
    job_id = bulk(core, who)

    assert end(core, job_id) == ("failed", "items_failed")
    job = core.worker_context.store.get(job_id, "default")
    assert (job.items_done, job.items_failed) == (2, 1)


# -- JWTs --------------------------------------------------------------------------------------------------


def granted(until_s: float, *scopes: str, issuer: str = "corp") -> Principal:
    return Principal(f"{issuer}:ada", "default", f"jwt:{issuer}:00", Grant(scopes, time.time() + until_s))


@pytest.fixture
def trusting(tmp_path: Path, redis_url: str) -> Guarded:
    """An install that trusts an issuer ``corp``."""
    issuer = Issuer()
    issuer.rollover("one")
    (tmp_path / "jwks.json").write_bytes(issuer.jwks)
    return Guarded(tmp_path, issuer_settings(f'jwks_file = "{tmp_path}/jwks.json"'), redis_url)


def test_a_job_of_a_jwt_runs_with_the_scopes_of_its_acceptance(trusting: Guarded) -> None:
    core = core_of(trusting)
    job_id = bulk(core, granted(60, "jobs:write", "encrypt"))
    assert core.worker_context.store.accepted(job_id).scopes == ("jobs:write", "encrypt")

    assert end(core, job_id) == ("succeeded", "")


def test_a_queued_job_of_a_jwt_ends_with_its_term(trusting: Guarded) -> None:
    core, who = core_of(trusting), granted(0.5, "jobs:write", "encrypt")
    job_id = bulk(core, who)
    assert who.grant
    until(lambda: who.grant and time.time() > who.grant.until, "the term of the JWT")

    assert end(core, job_id) == ("failed", "forbidden")


def test_an_issuer_that_is_no_longer_trusted_has_no_jobs(trusting: Guarded) -> None:
    core = core_of(trusting)
    job_id = bulk(core, granted(60, "jobs:write", "encrypt"))
    trusting.config.write_text(f"[kms]\n{REQUIRED}")

    assert end(core_of(trusting), job_id) == ("failed", "forbidden")


def test_scopes_in_a_record_rest_sealed(trusting: Guarded) -> None:
    core = core_of(trusting)
    job_id = bulk(core, granted(60, "jobs:write", f"encrypt key=default context=row={CANARY}", "encrypt"))

    rests = cast("dict[bytes, bytes]", core.worker_context.store.redis.hgetall(f"kms:job:{job_id}"))
    assert CANARY.encode() not in b"".join(rests.values())


# -- files: read and write apart ----------------------------------------------------------------------------


def reference(core: Core, who: Principal, source: Path, target: Path) -> str:
    terms = SubmissionOptions(who, "encrypt", Context.parse("a=b"))
    return core.submitter.files(
        terms, Reference(f"file://{source}", f"file://{target}", overwrite=False)
    ).job_id


@pytest.fixture
def files(install: Guarded) -> Path:
    for name in ("in", "out", "other"):
        (install.files / name).mkdir()
        (install.files / name / "plain").write_bytes(CANARY.encode())
    return install.files


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (("in/plain", "out/sealed"), ""),
        (("other/plain", "out/sealed"), "source"),
        (("out/plain", "out/sealed"), "source"),
        (("in/plain", "in/sealed"), "target"),
        (("in/plain", "other/sealed"), "target"),
        (("in/absent", "other/sealed"), "target"),
        (("other/absent", "out/sealed"), "source"),
    ],
    ids=str,
)
def test_files_are_read_and_written_where_the_scope_says(
    install: Guarded, core: Core, files: Path, names: tuple[str, str], rule: str
) -> None:
    who = caller(install, f"jobs:write,encrypt read=file://{files}/in/ write=file://{files}/out/")
    source, target = (files / name for name in names)
    if not rule:
        assert end(core, reference(core, who, source, target)) == ("succeeded", "")
        return

    with pytest.raises(Forbidden, match=rule):
        reference(core, who, source, target)


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
    install: Guarded, core: Core, files: Path, scopes: list[str]
) -> None:
    who = caller(install, *(line.replace("/{0}", str(files)) for line in scopes))

    with pytest.raises(KmsError) as caught:
        reference(core, who, files / "in/plain", files / "out/sealed")
    assert isinstance(caught.value, Forbidden | UnknownKey)
    assert str(files) not in caught.value.detail


@pytest.mark.parametrize("kind", ["rewrap", "reseal"])
@pytest.mark.parametrize(
    ("scopes", "key_id", "moves"),
    [
        (("{kind}",), None, False),
        (("decrypt",), None, False),
        (("encrypt",), None, False),
        (("{kind},decrypt",), None, False),
        (("{kind},encrypt",), None, False),
        (("decrypt,encrypt",), None, True),
        (("decrypt context=row=1", "encrypt context=row=2"), None, True),
        (("decrypt", "encrypt context=row=1"), None, False),
        (("decrypt", "encrypt key=default"), "other", False),
    ],
    ids=str,
)
def test_a_file_is_moved_elsewhere_by_decrypt_here_and_encrypt_there(
    request: pytest.FixtureRequest, kind: JobKind, scopes: Iterable[str], key_id: str | None, *, moves: bool
) -> None:
    install, core, files = map(request.getfixturevalue, ("install", "core", "files"))
    paths = f"read=file://{files}/ write=file://{files}/"
    who = caller(install, "jobs:write", *(f"{scope.format(kind=kind)} {paths}" for scope in scopes))
    terms = SubmissionOptions(
        who, kind, Context.parse("row=1"), key_id=key_id, new_context=Context.parse("row=2")
    )
    source, target = (files / "in/plain").as_uri(), (files / "out/sealed").as_uri()
    if moves:
        assert core.submitter.files(terms, Reference(source, target, overwrite=False)).state == "queued"
        return

    with pytest.raises((Forbidden, UnknownKey)):
        core.submitter.files(terms, Reference(source, target, overwrite=False))


def test_files_are_asked_for_again_when_the_job_runs(install: Guarded, core: Core, files: Path) -> None:
    who = caller(install, f"jobs:write,encrypt read=file://{files}/ write=file://{files}/")
    job_id = reference(core, who, files / "in/plain", files / "out/sealed")
    edit(install, who, scopes=[f"jobs:write,encrypt read=file://{files}/in/ write=file://{files}/in/"])

    assert end(core, job_id) == ("failed", "forbidden")
    assert not (files / "out/sealed").exists()


def test_the_key_of_a_file_must_be_in_the_scope_that_names_the_files(
    install: Guarded, core: Core, files: Path
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
    terms = SubmissionOptions(who, "decrypt", Context.parse("a=b"))
    source, target = f"file://{files}/in/sealed", f"file://{files}/out/plain-again"
    job_id = core.submitter.files(terms, Reference(source, target, overwrite=False)).job_id

    assert end(core, job_id)[0] == "failed"
    assert not (files / "out/plain-again").exists()


# -- results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("running")
    settings = f"{REQUIRED}failures_per_minute = 1000\n"
    with Guarded(folder, settings, valkey.files.url_of(next(database_numbers))) as service:
        yield service.start()


def decrypt_job(service: Guarded, headers: dict[str, str]) -> str:
    sealed = service.post(
        "/encrypt", {"plaintext": b64(CANARY.encode()), "context": "a=b"}, headers=service.token("encrypt")
    )
    job = {"kind": "decrypt", "items": [{"ciphertext": sealed.json()["ciphertext"]}], "context": "a=b"}
    job_id = str(service.post("/jobs", job, headers=headers).json()["job_id"])
    until(
        lambda: service.get(f"/jobs/{job_id}", headers=headers).json()["state"] == "succeeded",
        "the end of it",
    )
    return job_id


def test_results_are_for_their_submitter_and_for_who_could_have_made_them(running: Guarded) -> None:
    mine = running.token("jobs:read,jobs:write,decrypt context=a=b")
    path = f"/jobs/{decrypt_job(running, mine)}/result"

    assert json.loads(running.get(path, headers=mine).content)["plaintext"] == b64(CANARY.encode())
    assert running.get(path, headers=running.token("jobs:read,decrypt")).status_code == 200
    for scopes in (
        ["jobs:read"],
        ["jobs:read,encrypt"],
        ["jobs:read,decrypt context=a=b"],
        ["jobs:read,decrypt key=default"],
    ):
        answer = running.get(path, headers=running.token(*scopes))
        assert answer.status_code in {403, 404}, scopes
        assert CANARY not in answer.text
        assert b64(CANARY.encode()) not in answer.text


# -- messages without HTTP ---------------------------------------------------------------------------------


def taken(service: Guarded, headers: dict[str, str], **message: object) -> dict[str, object]:
    """Send a message, and wait until its job has ended."""
    asked = submission(**message)
    send(service, seal(whom_(service, headers), asked))
    path = f"/jobs/{asked['job_id']}"
    until(lambda: service.get(path, headers=headers).status_code == 200, "a worker has taken the message")
    until(lambda: service.get(path, headers=headers).json()["state"] in wire.ENDED, "the end of its job")
    found: dict[str, object] = service.get(path, headers=headers).json()
    return found


def whom_(service: Guarded, headers: dict[str, str]) -> str:
    return str(service.get("/intake", headers=headers).json()["recipient"])


def test_a_message_carries_a_token_and_its_job_is_the_holders(running: Guarded) -> None:
    token, text = running.make("jobs:read,jobs:write,encrypt", tenant="acme")
    job = taken(running, bearer(text), token=text)

    assert job["state"] == "succeeded"
    check_problem(
        running.get(f"/jobs/{job['job_id']}", headers=running.token("jobs:read")), 404, "unknown_job"
    )
    events = running.get(
        "/audit", params={"job_id": job["job_id"]}, headers=running.token("audit:read", tenant="acme")
    )
    assert {event["principal"] for event in events.json()["events"]} == {token.name}


@pytest.fixture
def desk(install: Guarded, core: Core) -> Callable[[dict[str, object]], str]:
    """The intake, as a worker has it."""
    made = build_intake(install.settings, core.submitter)
    assert made
    recipient = str(celery_intake.recipient(install.settings.kms.jobs.intake_identity_path))
    return lambda asked: made.accept(seal(recipient, asked), "w")


@pytest.mark.parametrize("kind", ["null", "empty", "odd", "revoked", "weak"])
def test_a_message_without_a_good_token_is_refused(
    install: Guarded, desk: Callable[[dict[str, object]], str], kind: str
) -> None:
    _, revoked = install.make("jobs:write,encrypt")
    tokens.revoke(install.token_file, revoked[4:14])
    shown = {"null": None, "empty": "", "odd": "x", "revoked": revoked, "weak": install.make("encrypt")[1]}

    with pytest.raises(Forbidden if kind == "weak" else Unauthenticated):
        desk(submission(token=shown[kind]))


def test_a_message_of_another_tenant_cannot_take_a_jobs_id(
    install: Guarded, desk: Callable[[dict[str, object]], str]
) -> None:
    asked = submission(token=install.make("jobs:write,encrypt", tenant="acme")[1])
    desk(asked)
    assert desk(asked) == asked["job_id"]

    with pytest.raises(IdempotencyConflict):
        desk({**asked, "token": install.make("jobs:write,encrypt", tenant="web")[1]})


# -- quotas ------------------------------------------------------------------------------------------------


def test_a_tenant_has_so_many_open_jobs_and_room_again_when_one_ends(install: Guarded, core: Core) -> None:
    small, other = caller(install, "*", tenant="small"), caller(install, "*")
    first, _ = (bulk(core, small, [wire.JobItem(plaintext=b"x")]) for _ in range(2))
    with pytest.raises(RateLimited, match="open jobs") as caught:
        bulk(core, small, [wire.JobItem(plaintext=b"x")])
    assert caught.value.retry_after_s > 0
    assert len(install.spooled()) == 2 * 2
    bulk(core, other)
    assert end(core, first, "small") == ("succeeded", "")

    bulk(core, small, [wire.JobItem(plaintext=b"x")])


def test_a_tenant_has_so_much_of_the_spool_until_results_expire(install: Guarded, core: Core) -> None:
    narrow = caller(install, "*", tenant="narrow")
    item = [wire.JobItem(plaintext=bytes(30))]
    job_id = bulk(core, narrow, item)
    with pytest.raises(SpoolQuota, match="in the spool"):
        bulk(core, narrow, item)
    end(core, job_id, "narrow")
    with pytest.raises(SpoolQuota, match="in the spool"):
        bulk(core, narrow, item)
    bulk(core, caller(install, "*"), [wire.JobItem(plaintext=bytes(3000))])
    core.worker_context.store.purged(job_id)

    bulk(core, narrow, item)


def test_items_above_the_quota_are_refused_while_they_arrive(install: Guarded, core: Core) -> None:
    """Not once they are in the spool: a stream of items has no end that is known beforehand."""
    taken = itertools.count()
    items = (wire.JobItem(plaintext=bytes(30)) for _ in zip(range(1000), taken, strict=False))
    terms = SubmissionOptions(caller(install, "*", tenant="narrow"), "encrypt", Context.parse("row=1"))
    with pytest.raises(SpoolQuota, match="in the spool"):
        core.submitter.items(terms, items)

    assert next(taken) < 10
    assert install.spooled() == []


def test_an_upload_above_the_quota_is_refused_while_it_arrives(install: Guarded, core: Core) -> None:
    """Or before, if it tells its size."""
    terms = SubmissionOptions(caller(install, "*", tenant="narrow"), "encrypt", Context.parse("row=1"))
    with pytest.raises(SpoolQuota, match="in the spool"):
        next(core.submitter.receive_upload(terms, 151))
    receiving = core.submitter.receive_upload(terms, 0)
    next(receiving)
    receiving.send((memoryview(bytes(150)), True))
    with pytest.raises(SpoolQuota, match="in the spool"):
        receiving.send((memoryview(bytes(1)), True))

    assert install.spooled() == []


def test_submissions_at_once_are_counted_one_by_one(install: Guarded, core: Core) -> None:
    """What looked at the room before another took it is told so by the store."""
    store = core.worker_context.store
    store.submit(accepted(tenant="narrow", size_bytes=100))
    with pytest.raises(SpoolQuota, match="in the spool"):
        store.submit(accepted(tenant="narrow", size_bytes=51))
    store.submit(accepted(tenant="narrow", size_bytes=100, source="file:///a", target="file:///b"))
    assert store.spool_room("narrow") == 50

    store.submit(accepted(tenant="narrow", size_bytes=50))
    assert store.spool_room("narrow") == 0
    assert store.spool_room("default") is None
    assert install.spooled() == []


def test_a_job_that_was_cancelled_or_failed_frees_the_spool(install: Guarded, core: Core) -> None:
    narrow = caller(install, "*", tenant="narrow")
    item = [wire.JobItem(plaintext=bytes(30))]
    core.worker_context.store.cancel(bulk(core, narrow, item), "narrow")
    remove_inputs(core)
    job_id = bulk(core, narrow, item)
    edit(install, narrow, scopes=["jobs:write"])
    assert end(core, job_id, "narrow") == ("failed", "forbidden")
    remove_inputs(core)
    edit(install, narrow, scopes=["*"])

    bulk(core, narrow, item)


def test_what_a_tenant_may_ask_for_is_said_over_http(tmp_path: Path) -> None:
    settings = (
        f"{REQUIRED}[kms.tenants.acme]\nrequests_per_s = 0.01\nburst = 6\nspool_bytes = 1000\nopen_jobs = 1\n"
    )
    with Guarded(tmp_path, settings) as own:
        own.start("api")
        acme, web = own.token("*", tenant="acme"), own.token("*", tenant="web")
        big = own.post("/files/encrypt", content=bytes(2000), headers=acme)
        streamed = own.post("/files/encrypt", content=iter([bytes(600), bytes(600)]), headers=acme)
        assert own.post("/files/encrypt", content=bytes(900), headers=acme).status_code == 202
        second = own.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}]}, headers=acme)
        spooled = own.spooled()
        asked = [own.get("/status", headers=acme) for _ in range(5)]

        for answer in (big, streamed):
            check_problem(answer, 507, "spool_quota")
            assert "kms job release" in answer.json()["detail"]
        check_problem(second, 429, "rate_limited")
        assert int(second.headers["retry-after"]) >= 1
        assert len(spooled) == 2  # the folder and the blob of what was taken
        assert [answer.status_code for answer in asked] == [200, 200, 429, 429, 429]
        waiting = asked[0].json()["jobs"]["queued"], own.get("/status", headers=web).json()["jobs"]["queued"]
        assert waiting == (1, 0)
        assert own.get("/health").status_code == 200
        told = own.http.get("/metrics").text
        assert 'tenant="web"' not in told


def test_everybody_is_known_by_an_id_that_is_not_the_token(running: Guarded) -> None:
    token, text = running.make("encrypt")
    name = str(uuid.uuid4())
    running.post(
        "/encrypt", {"plaintext": "aGk=", "context": "a=b"}, headers={**bearer(text), "X-Request-Id": name}
    )
    reader = running.token("audit:read")

    def recorded() -> list[dict[str, object]]:
        found: list[dict[str, object]] = running.get(
            "/audit", params={"request_id": name}, headers=reader
        ).json()["events"]
        return found

    until(recorded, "the record")
    assert [(event["principal"], event["credential"]) for event in recorded()] == [
        (token.name, f"token:{token.id}")
    ]
    assert ISSUER not in str(recorded())

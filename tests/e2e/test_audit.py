"""The audit trail from outside: ids in answers, pages over HTTP, kills and full disks, the command."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kms_client import Client
from kms_core.audit import AuditRecord
from kms_core.audit.keys import PublicKeys
from kms_core.audit.verification.verify import verify
from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, KmsError
from kms_protocol.wire import JobItem
from support.audit_logs import Place, record
from support.job_stores import forge
from support.programs import tied
from support.service import CANARY, CONTEXT, Service, b64, check_problem, core_of
from support.waiting import until

WHO = Principal("local")


class Killed(BaseException):
    """As near to SIGKILL as an exception comes: nothing of ours handles it."""


@pytest.fixture
def own(tmp_path: Path, redis_url: str) -> Iterator[Service]:
    """A service whose trail may be hurt."""
    with Service(tmp_path, redis=redis_url) as running:
        yield running


def kms(service: Service, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "kms_cli.main", *args]
    return subprocess.run(argv, env=service.environ, capture_output=True, text=True, check=False, timeout=60)


def verified(service: Service) -> dict[str, Any]:
    """As ``kms audit verify --json`` says it, which takes a second more."""
    report = verify(service.state / "audit", PublicKeys.read(service.state / "audit-signing.pub"))
    return {"verdict": report.verdict, **asdict(report)}


# -- answers -----------------------------------------------------------------------------------------


def test_an_answer_carries_the_id_of_its_record(service: Service) -> None:
    good = service.post("/encrypt", {"plaintext": b64(b"four"), "context": f"shown={CANARY}"})
    bad = service.post("/decrypt", {"ciphertext": b64(b"junk")})
    found = [
        event
        for answer in (good, bad)
        for event in service.audited(request_id=answer.headers["x-request-id"])
    ]
    ids = {event["id"]: event for event in found}

    sealed, refused = ids[good.headers["x-kms-audit-id"]], ids[bad.headers["x-kms-audit-id"]]
    assert (sealed["operation"], sealed["result"], sealed["bytes_in"]) == ("encrypt", "ok", 4)
    assert sealed["source"] == "127.0.0.1"
    assert sealed["request_id"] == good.headers["x-request-id"]
    assert list(sealed["context"]) == ["shown"]
    assert (refused["operation"], refused["result"]) == ("decrypt", "not_a_ciphertext")
    assert CANARY not in json.dumps(list(ids.values()))


def test_a_call_that_records_nothing_has_no_id(service: Service) -> None:
    assert "x-kms-audit-id" not in service.get("/health").headers


def test_a_request_with_a_foreign_host_is_on_record(service: Service) -> None:
    answer = service.get("/health", headers={"Host": "evil.example", "X-Request-Id": "foreign-host"})
    name = answer.headers["x-kms-audit-id"]
    lines = (json.loads(line) for path in trail_files(service) for line in path.read_bytes().splitlines())
    (line,) = [line for line in lines if line.get("request_id") == "foreign-host"]

    assert answer.status_code == 403
    assert name == f"{line['chain']}:{line['seq']}"
    assert (line["operation"], line["result"], line["principal"]) == ("denied", "forbidden", "")


def trail_files(service: Service) -> list[Path]:
    return sorted((service.state / "audit").glob("*.jsonl"))


def test_each_item_of_a_batch_is_a_record(service: Service) -> None:
    items = [{"plaintext": b64(b"x"), "context": f"row={number}"} for number in range(5)]
    request_id = "a-batch-of-five"
    service.post(
        "/batch",
        {"operation": "encrypt", "items": [*items, {"plaintext": b64(b"x"), "key_id": "absent"}]},
        headers={"X-Request-Id": request_id},
    )
    found = service.audited(request_id=request_id)

    assert [event["result"] for event in found] == ["ok"] * 5 + ["unknown_key"]
    assert len({event["context"]["row"] for event in found[:5]}) == 5


def test_each_item_of_a_job_is_a_record(service: Service) -> None:
    items = [{"plaintext": b64(b"x")}, {"plaintext": b64(b"y")}]
    job_id = service.submit(
        {"kind": "encrypt", "items": items, "context": CONTEXT}, x_request_id="a-job-of-two"
    )
    service.wait(job_id, "succeeded")
    found = service.audited(job_id=job_id, operation="encrypt")

    assert [(event["result"], event["request_id"]) for event in found] == [("ok", "a-job-of-two")] * 2
    assert found[0]["id"].startswith("worker-")


def test_what_is_done_with_a_job_is_on_record(service: Service) -> None:
    submitted = service.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}], "context": CONTEXT})
    job_id = submitted.json()["job_id"]
    early = service.get(f"/jobs/{job_id}/result")
    service.wait(job_id, "succeeded")
    result = service.get(f"/jobs/{job_id}/result")
    service.post(f"/jobs/{job_id}/cancel")
    service.post(f"/jobs/{job_id}/retry")
    found = {event["id"]: event for event in service.audited(job_id=job_id)}

    assert found[submitted.headers["x-kms-audit-id"]]["operation"] == "job.submit"
    assert found[result.headers["x-kms-audit-id"]]["operation"] == "job.result"
    assert early.status_code in {200, 409}
    done = [(event["operation"], event["result"]) for event in found.values()]
    assert done[0] == ("job.submit", "ok")
    assert done[-2:] == [("job.cancel", "ok"), ("job.retry", "job_not_dead")]


# -- pages -------------------------------------------------------------------------------------------


def test_pages_go_on_where_the_last_one_ended(service: Service) -> None:
    request_id = "pages-of-two"
    for number in range(5):
        service.post(
            "/encrypt",
            {"plaintext": "", "context": f"row={number}"},
            headers={"X-Request-Id": request_id},
        )
    found, after, more = [], None, True
    with Client(service.url) as client:
        while more:
            page = client.audit(after=after, limit=2, request_id=request_id)
            assert len(page.events) <= 2
            found += page.events
            after, more = page.next, page.more
        service.post("/encrypt", {"plaintext": ""}, headers={"X-Request-Id": request_id})
        later = client.audit(after=after, request_id=request_id)

    assert len({event.id for event in found}) == len(found) == 5
    assert len(later.events) == 1


def test_a_tenant_sees_its_own_records_alone(own: Service) -> None:
    own.start("api")
    own.encrypt(b"ours")
    other = Place(own.state)
    trail = other.trail(role="other")
    trail.append(record(1, tenant="another"))
    trail.append(record(2, tenant="default"))
    trail.close()

    assert [event["principal"] for event in own.audited()] == ["local", "ada-2"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "after=x",
        "since=yesterday",
        "since=2026-01-01",
        "tenant=x",
    ],
)
def test_what_is_not_understood_is_refused(service: Service, query: str) -> None:
    check_problem(service.get(f"/audit?{query}"), 422, "invalid_request")


def test_filters_narrow_a_page(service: Service) -> None:
    service.encrypt(b"x")
    service.post("/decrypt", {"ciphertext": b64(b"junk")})

    assert {event["operation"] for event in service.audited(operation="decrypt")} == {"decrypt"}
    assert "ok" not in {event["result"] for event in service.audited(result="failed")}
    assert service.audited(since="2100-01-01T00:00:00Z") == []
    assert service.audited(until="2000-01-01T00:00:00+00:00") == []


# -- disks -------------------------------------------------------------------------------------------


def test_readiness_is_red_while_records_cannot_be_written_and_comes_back(own: Service) -> None:
    own.start("api")
    own.encrypt(b"before")
    folder, moved = own.state / "audit", own.state / "moved"
    folder.rename(moved)
    folder.touch()

    check_problem(own.post("/encrypt", {"plaintext": ""}), 503, "audit_unavailable")
    red = own.http.get("/readyz")
    degraded = own.get("/status").json()["degraded"]
    folder.unlink()
    moved.rename(folder)
    green = own.http.get("/readyz")

    assert (red.status_code, red.json()["status"], red.json()["audit"]) == (503, "not ready", "unavailable")
    assert "audit" in degraded
    assert (green.status_code, green.json()["audit"]) == (200, "available")
    own.encrypt(b"after")
    assert [event["result"] for event in own.audited()] == ["ok", "ok"]
    assert "resumed" in [note["code"] for note in verified(own)["notes"]]


def test_a_denial_that_cannot_be_recorded_is_not_answered_as_one(own: Service) -> None:
    own.start("api")
    (own.state / "audit").touch()
    answer = own.get("/health", headers={"Host": "evil.example"})

    assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")


def test_a_deleted_file_is_noticed_by_the_next_call(own: Service) -> None:
    own.start("api")
    own.encrypt(b"one")
    trail_files(own)[0].unlink()
    own.encrypt(b"two")

    assert len(own.audited()) == 1
    assert [problem["code"] for problem in verified(own)["problems"]] == ["missing_file"]


def test_with_fsync_many_calls_at_once_are_answered(tmp_path: Path) -> None:
    with Service(tmp_path, '[kms.audit]\ndurability = "fsync"\n', "unix:///nonexistent.sock") as service:
        service.start("api")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: service.encrypt(b"%d" % number), range(64)))

        assert len(service.audited()) == 64
        assert verified(service)["verdict"] == "intact"


# -- ends --------------------------------------------------------------------------------------------


def states(service: Service) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for chain in verified(service)["chains"]:
        found.setdefault(chain["chain"].partition("-")[0], []).append(chain["state"])
    return found


def test_a_clean_stop_closes_the_chains_of_all_processes(own: Service) -> None:
    own.start()
    own.encrypt(b"x")
    own.wait(own.submit({"kind": "encrypt", "items": [{"plaintext": ""}], "context": CONTEXT}))

    assert states(own) == {"api": ["open"], "worker": ["open"]}
    own.stop("worker")
    own.stop("api")
    found = verified(own)
    assert states(own) == {"api": ["closed"], "worker": ["closed"]}
    assert all(chain["signed_seq"] == chain["last_seq"] for chain in found["chains"])
    assert found["verdict"] == "intact"


def test_a_killed_process_is_cut_or_crashed_until_the_next_one_has_seen_its_end(own: Service) -> None:
    own.start("api")
    for number in range(3):
        own.encrypt(b"%d" % number)
    own.kill("api")

    assert verified(own)["verdict"] == "open end"
    assert kms(own, "audit", "verify").returncode == 1
    own.start("api")
    own.encrypt(b"again")
    until(lambda: verified(own)["verdict"] == "intact", "the next one has signed what it saw")
    found = verified(own)
    assert found["chains"][0]["witness"] == found["chains"][1]["chain"]
    assert len(own.audited()) == 4


def test_anchors_in_redis_tell_of_a_cut(own: Service) -> None:
    own.start("api")
    for number in range(5):
        own.encrypt(b"%d" % number)
    own.stop("api")
    (path,) = trail_files(own)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))

    assert verified(own)["problems"] == []
    done = kms(own, "audit", "verify", "--json", "--anchors", "redis")
    assert done.returncode == 65
    assert [problem["code"] for problem in json.loads(done.stdout)["problems"]] == ["cut"]


# -- effects -----------------------------------------------------------------------------------------


class DyingTrail:
    """A trail whose process dies before it writes the outcome of an effect."""

    def __init__(self, core: Core) -> None:
        self._trail = core.kms.audit_log
        self.conceal = self._trail.conceal
        self.together = self._trail.together
        self.check = self._trail.check

    def append(self, record: AuditRecord) -> str:
        if record.stage == "outcome":
            raise Killed
        return self._trail.append(record)


def of_effects(place: Place) -> list[tuple[str, str]]:
    lines = sorted(place.operations(), key=lambda line: str(line["time"]))
    return [(line["stage"], line.get("result", "")) for line in lines if "stage" in line]


def unresolved(service: Service) -> list[str]:
    return [note["text"] for note in verified(service)["notes"] if note["code"] == "no_outcome"]


def test_an_effect_without_outcome_is_resolved_by_the_next_attempt(tmp_path: Path, redis_url: str) -> None:
    service = Service(tmp_path, "[kms.jobs]\nlease_s = 2\n", redis_url)
    core, dying = core_of(service), core_of(service)
    source, target = service.files / "in", service.files / "out"
    source.write_bytes(b"data")
    terms = SubmissionOptions(WHO, "encrypt", Context.parse(CONTEXT))
    job_id = core.submitter.files(
        terms, Reference(f"file://{source}", f"file://{target}", overwrite=False)
    ).job_id
    dying.kms.audit_log = DyingTrail(dying)
    with pytest.raises(Killed):
        run_job(job_id, dying.worker_context, "w1")

    assert target.exists()
    (found,) = unresolved(service)
    assert found.startswith(f"commit {job_id}-")
    forge(core.worker_context.store, job_id, lease_until="0")
    run_job(job_id, core.worker_context, "w2")
    assert core.worker_context.store.get(job_id, "default").state == "succeeded"
    assert unresolved(service) == []
    assert of_effects(Place(service.state)) == [("intent", ""), ("intent", ""), ("outcome", "ok")]


def test_an_effect_that_is_refused_says_so(tmp_path: Path, redis_url: str) -> None:
    service = Service(tmp_path, redis=redis_url)
    core = core_of(service)
    source, target = service.files / "in", service.files / "out"
    source.write_bytes(b"data")
    terms = SubmissionOptions(WHO, "encrypt", Context.parse(CONTEXT))
    job_id = core.submitter.files(
        terms, Reference(f"file://{source}", f"file://{target}", overwrite=False)
    ).job_id

    class Late(DyingTrail):
        """Somebody takes the target's name between the intent and the effect."""

        def append(self, record: AuditRecord) -> str:
            if record.stage == "intent":
                target.write_bytes(b"precious")
            return core_trail.append(record)

    core_trail, core.kms.audit_log = core.kms.audit_log, Late(core)
    run_job(job_id, core.worker_context, "w1")

    assert core.worker_context.store.get(job_id, "default").error == "target_exists"
    assert target.read_bytes() == b"precious"
    assert of_effects(Place(service.state)) == [("intent", ""), ("outcome", "target_exists")]


def test_no_effect_begins_without_its_intent_on_record(tmp_path: Path, redis_url: str) -> None:
    service = Service(tmp_path, redis=redis_url)
    core = core_of(service)
    source, target = service.files / "in", service.files / "out"
    source.write_bytes(b"data")
    terms = SubmissionOptions(WHO, "encrypt", Context.parse(CONTEXT))
    job_id = core.submitter.files(
        terms, Reference(f"file://{source}", f"file://{target}", overwrite=False)
    ).job_id

    class Full(DyingTrail):
        """A disk that fills up before the intent."""

        def append(self, record: AuditRecord) -> str:
            if record.stage == "intent":
                raise AuditUnavailable
            return core_trail.append(record)

    core_trail, core.kms.audit_log = core.kms.audit_log, Full(core)
    with contextlib.suppress(KmsError):
        run_job(job_id, core.worker_context, "w1")
    assert not target.exists()

    core.kms.audit_log = core_trail
    forge(core.worker_context.store, job_id, lease_until="0", not_before="0")
    run_job(job_id, core.worker_context, "w2")
    assert target.exists()
    assert of_effects(Place(service.state)) == [("intent", ""), ("outcome", "ok")]


def test_items_of_a_job_whose_records_cannot_be_written_have_no_result(
    tmp_path: Path, redis_url: str
) -> None:
    service = Service(tmp_path, redis=redis_url)
    core = core_of(service)
    terms = SubmissionOptions(WHO, "encrypt", Context.parse(CONTEXT))
    job_id = core.submitter.items(terms, [JobItem(plaintext=b"x")]).job_id
    assert (service.state / "audit").is_dir()
    shutil.rmtree(service.state / "audit")
    (service.state / "audit").touch()
    run_job(job_id, core.worker_context, "w1")

    assert core.worker_context.store.get(job_id, "default").state == "queued"


# -- the command -------------------------------------------------------------------------------------


def test_the_command_verifies_shows_and_proves(own: Service) -> None:
    own.start("api")
    answer = own.post("/encrypt", {"plaintext": "", "context": "row=7"})
    own.encrypt(b"another", "row=8")
    own.stop("api")
    name = answer.headers["x-kms-audit-id"]

    whole = kms(own, "audit", "verify")
    shown = kms(own, "audit", "tail", "--context", "row=7")
    proof = kms(own, "audit", "receipt", name)
    (own.state / "receipt.json").write_text(proof.stdout)
    checked = kms(own, "audit", "check-receipt", str(own.state / "receipt.json"))
    assert (whole.returncode, whole.stdout.splitlines()[-1].partition(":")[0]) == (0, "intact")
    assert [line.rpartition("  ")[2] for line in shown.stdout.splitlines()] == [name]
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["request_id"] == answer.headers["x-request-id"]

    (own.state / "receipt.json").write_text(proof.stdout.replace("encrypt", "decrypt"))
    forged = kms(own, "audit", "check-receipt", str(own.state / "receipt.json"))
    assert forged.returncode == 65


def test_the_command_says_what_is_damaged(own: Service) -> None:
    own.start("api")
    own.encrypt(b"x")
    own.stop("api")
    (path,) = trail_files(own)
    path.write_bytes(path.read_bytes().replace(b'"encrypt"', b'"decrypt"'))
    done = kms(own, "audit", "verify")

    assert done.returncode == 65
    assert f"edited: {path.name} line 1: a line was changed after it was written" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("damaged: 1 chain")


def test_another_machine_verifies_with_the_public_key_alone(own: Service, tmp_path: Path) -> None:
    own.start("api")
    own.encrypt(b"x")
    own.stop("api")
    key = kms(own, "audit", "key")
    shutil.copytree(own.state / "audit", tmp_path / "copy")
    (tmp_path / "key.pem").write_text(key.stdout)
    shutil.rmtree(own.state)
    arguments = ("audit", "verify", str(tmp_path / "copy"), "--public-key", str(tmp_path / "key.pem"))

    assert kms(own, *arguments).returncode == 0
    assert key.stdout.startswith("-----BEGIN PUBLIC KEY-----")


def test_tail_follows(own: Service) -> None:
    own.start("api")
    own.encrypt(b"one")
    argv = tied(sys.executable, "-P", "-u", "-m", "kms_cli.main", "audit", "tail", "-f", "--json")
    with subprocess.Popen(argv, env=own.environ, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        first = json.loads(following.stdout.readline())
        own.encrypt(b"two")
        second = json.loads(following.stdout.readline())
        following.send_signal(signal.SIGINT)
        following.wait(30)

    assert [first["seq"], second["seq"]] == [1, 2]
    assert following.returncode == 130


def test_a_folder_without_a_trail_is_no_intact_one(own: Service, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = kms(own, "audit", "verify", str(empty))

    assert done.returncode == 65
    assert "no audit log" in done.stderr

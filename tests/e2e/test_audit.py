"""The audit trail from outside: ids in answers, pages over HTTP, kills and full disks, the command."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from kms_client import Client
from kms_core.audit.keys import PublicKeys
from kms_core.audit.verification.verify import verify
from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_protocol.errors import AuditUnavailable, KmsError
from kms_protocol.wire import JobItem
from support.audit_logs import AuditFolder, InterceptedLog, fail, record, unresolved
from support.core_jobs import run_job
from support.credentials import REQUIRED, SecuredService, bearer
from support.failing_store import Killed
from support.job_options import job_options
from support.job_stores import forge
from support.programs import tethered
from support.service import CANARY, CONTEXT, Service, b64, check_problem, core_of
from support.waiting import until

WHO = Principal("local")
NO_REDIS: Final = "unix:///nonexistent.sock"
EAGER: Final = "[kms.audit]\ncheckpoint_s = 1\n"


@pytest.fixture
def own(tmp_path: Path, redis_url: str) -> Iterator[Service]:
    """A service whose trail may be hurt."""
    with Service(tmp_path, redis=redis_url) as running:
        yield running


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


def test_a_request_with_a_foreign_host_is_on_record(service: Service) -> None:
    answer = service.get("/health", headers={"Host": "evil.example", "X-Request-Id": "foreign-host"})
    name = answer.headers["x-kms-audit-id"]
    lines = AuditFolder(service.state).operations()
    (line,) = [line for line in lines if line.get("request_id") == "foreign-host"]

    assert answer.status_code == 403
    assert name == f"{line['chain']}:{line['seq']}"
    assert (line["operation"], line["result"], line["principal"]) == ("denied", "forbidden", "")


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
    for _ in range(5):
        service.post("/encrypt", {"plaintext": ""}, headers={"X-Request-Id": request_id})
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
    other = AuditFolder(own.state)
    trail = other.trail(role="other")
    trail.append(record(1, tenant="another"))
    trail.append(record(2, tenant="default"))
    trail.close()

    assert [event["principal"] for event in own.audited()] == ["local", "ada-2"]


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
    degraded = own.degraded
    folder.unlink()
    moved.rename(folder)
    green = own.http.get("/readyz")

    assert (red.status_code, red.json()["status"], red.json()["audit"]) == (503, "not ready", "unavailable")
    assert "audit" in degraded
    assert (green.status_code, green.json()["audit"]) == (200, "available")
    own.encrypt(b"after")
    assert [event["result"] for event in own.audited()] == ["ok", "ok"]
    assert "resumed" in [note["code"] for note in verified(own)["notes"]]


def test_with_fsync_many_calls_at_once_are_answered(tmp_path: Path) -> None:
    with Service(tmp_path, '[kms.audit]\ndurability = "fsync"\n', NO_REDIS) as service:
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

    is_open = {"api": ["open"], "worker": ["open"] * 2}  # of the pool process, and of the maintenance process
    until(lambda: states(own) == is_open, "the maintenance process has begun its chain")
    own.stop("worker")
    own.stop("api")
    found = verified(own)
    assert states(own) == {"api": ["closed"], "worker": ["closed"] * 2}
    assert all(chain["signed_seq"] == chain["last_seq"] for chain in found["chains"])
    assert found["verdict"] == "intact"


# -- effects -----------------------------------------------------------------------------------------


@dataclass
class FileJob:
    """A job from file to file, in an install without processes."""

    service: Service
    core: Core
    job_id: str = ""

    @property
    def target(self) -> Path:
        return self.service.files / "out"

    def run(self, stage: str = "", happens: Callable[[], object] = lambda: None) -> str:
        """An attempt, in which something happens before the record of a stage; the code of its end."""
        core = core_of(self.service)
        if stage:
            core.kms.audit_log = InterceptedLog(core.kms.audit_log, stage, happens)
        with contextlib.suppress(KmsError):
            run_job(self.job_id, core.worker_context, "w")
        return self.core.worker_context.store.get(self.job_id, "default").error

    def expire_leases(self) -> None:
        forge(self.core.worker_context.store, self.job_id, lease_until="0", not_before="0")

    def recorded(self) -> list[tuple[str, str]]:
        """The stages of effects, with their results."""
        lines = sorted(AuditFolder(self.service.state).operations(), key=lambda line: str(line["time"]))
        return [(line["stage"], line.get("result", "")) for line in lines if "stage" in line]


@pytest.fixture
def job(tmp_path: Path, redis_url: str) -> FileJob:
    service = Service(tmp_path, redis=redis_url)
    made = FileJob(service, core_of(service))
    (service.files / "in").write_bytes(b"data")
    source, target = (service.files / "in").as_uri(), made.target.as_uri()
    options = job_options(WHO, "encrypt", CONTEXT, source=source, target=target)
    made.job_id = made.core.submitter.files(options).job_id
    return made


def test_an_effect_without_outcome_is_resolved_by_the_next_attempt(job: FileJob) -> None:
    with pytest.raises(Killed):
        job.run("outcome", lambda: fail(Killed()))
    assert job.target.exists()
    (found,) = unresolved(job.service.state)
    assert found.startswith(f"commit {job.job_id}-")

    job.expire_leases()
    assert job.run() == ""
    assert unresolved(job.service.state) == []
    assert job.recorded() == [("intent", ""), ("intent", ""), ("outcome", "ok")]


def test_an_effect_that_is_refused_says_so(job: FileJob) -> None:
    """Somebody takes the target's name between the intent and the effect."""
    assert job.run("intent", lambda: job.target.write_bytes(b"precious")) == "target_exists"

    assert job.target.read_bytes() == b"precious"
    assert job.recorded() == [("intent", ""), ("outcome", "target_exists")]


def test_no_effect_begins_without_its_intent_on_record(job: FileJob) -> None:
    """The disk fills up before it."""
    job.run("intent", lambda: fail(AuditUnavailable()))
    assert not job.target.exists()

    job.expire_leases()
    job.run()
    assert job.target.exists()
    assert job.recorded() == [("intent", ""), ("outcome", "ok")]


def test_items_of_a_job_whose_records_cannot_be_written_have_no_result(
    tmp_path: Path, redis_url: str
) -> None:
    service = Service(tmp_path, redis=redis_url)
    core = core_of(service)
    terms = job_options(WHO, "encrypt", CONTEXT)
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
    name, file_id = answer.headers["x-kms-audit-id"], answer.json()["file_id"]

    whole = own.run_kms("audit", "verify")
    shown = own.run_kms("audit", "tail", "--context", "row=7")
    proof = own.run_kms("audit", "receipt", name)
    (own.state / "receipt.json").write_text(proof.stdout)
    checked = own.run_kms("audit", "check-receipt", str(own.state / "receipt.json"))
    assert (whole.returncode, whole.stdout.splitlines()[-1].partition(":")[0]) == (0, "intact")
    found = own.run_kms("audit", "tail", "--file-id", file_id)
    assert [line.split("  ")[-2:] for line in shown.stdout.splitlines()] == [[name, file_id]]
    assert found.stdout == shown.stdout
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["request_id"] == answer.headers["x-request-id"]

    (own.state / "receipt.json").write_text(proof.stdout.replace("encrypt", "decrypt"))
    forged = own.run_kms("audit", "check-receipt", str(own.state / "receipt.json"))
    assert forged.returncode == 65


def test_another_machine_verifies_with_the_public_key_alone(own: Service, tmp_path: Path) -> None:
    own.start("api")
    own.encrypt(b"x")
    own.stop("api")
    key = own.run_kms("audit", "key")
    shutil.copytree(own.state / "audit", tmp_path / "copy")
    (tmp_path / "key.pem").write_text(key.stdout)
    shutil.rmtree(own.state)
    arguments = ("audit", "verify", str(tmp_path / "copy"), "--public-key", str(tmp_path / "key.pem"))

    assert own.run_kms(*arguments).returncode == 0
    assert key.stdout.startswith("-----BEGIN PUBLIC KEY-----")


def test_tail_follows(own: Service) -> None:
    own.start("api")
    own.encrypt(b"one")
    argv = tethered(sys.executable, "-P", "-u", "-m", "kms_cli.main", "audit", "tail", "-f", "--json")
    with subprocess.Popen(argv, env=own.environ, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        first = json.loads(following.stdout.readline())
        own.encrypt(b"two")
        second = json.loads(following.stdout.readline())
        following.send_signal(signal.SIGINT)
        following.wait(30)

    assert [first["operation"], second["operation"]] == ["encrypt", "encrypt"]
    assert second["seq"] > first["seq"], "a checkpoint may lie between them"
    assert following.returncode == 130


# -- reads, which are on record -------------------------------------------------------------------------


def reads(service: Service) -> list[tuple[str, str, int]]:
    """Who read, with which filter, and how many records."""
    return [
        (line["principal"], line.get("filter", ""), line.get("count", 0))
        for line in AuditFolder(service.state).operations()
        if line["operation"] == "audit.read"
    ]


def test_pages_over_http_leave_one_record_each(tmp_path: Path) -> None:
    with SecuredService(tmp_path, REQUIRED, NO_REDIS) as own:
        (token, text), _ = own.new_token("audit:read", "encrypt"), own.start("api")
        own.post("/encrypt", {"plaintext": ""}, headers=bearer(text))
        answer = own.get("/audit", params={"operation": "encrypt", "limit": "1"}, headers=bearer(text))
        name = answer.headers["x-kms-audit-id"]
        again = own.get("/audit", params={"operation": "audit.read"}, headers=bearer(text)).json()

        assert reads(own)[0] == (token.name, "operation=encrypt", 1)
        assert [event["id"] for event in again["events"]] == [name]
        assert (again["events"][0]["filter"], again["events"][0]["count"]) == ("operation=encrypt", 1)
        assert len(reads(own)) == 2, "a page that is read adds one record, and no more"


def test_a_page_that_cannot_be_recorded_is_not_given(tmp_path: Path) -> None:
    with Service(tmp_path, redis=NO_REDIS) as own:
        own.start("api")
        own.encrypt(b"x")
        (own.state / "audit").rename(own.state / "moved")
        (own.state / "audit").touch()

        answer = own.get("/audit")
        assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")
        assert "encrypt" not in own.http.get("/ui/audit").text.partition("<table")[2]


def test_the_page_and_its_receipts_are_on_record(tmp_path: Path) -> None:
    with Service(tmp_path, EAGER, redis=NO_REDIS) as own:
        own.start("api")
        name = own.post("/encrypt", {"plaintext": ""}).headers["x-kms-audit-id"]
        own.http.get("/ui/audit", params={"operation": "encrypt"})
        receipt = f"/ui/audit/{name}/receipt"
        until(lambda: own.http.get(receipt).status_code == 200, "a checkpoint follows")

        assert ("local", "operation=encrypt&period=24h", 1) in reads(own)
        assert reads(own)[-1] == ("local", f"receipt={name}", 1)


def test_the_command_records_what_it_shows(tmp_path: Path) -> None:
    with Service(tmp_path, EAGER, redis=NO_REDIS) as own:
        own.start("api")
        name = own.post("/encrypt", {"plaintext": ""}).headers["x-kms-audit-id"]
        own.stop("api")
        shown = own.run_kms("audit", "tail", "--operation", "encrypt")
        proof = own.run_kms("audit", "receipt", name)
        user = pwd.getpwuid(os.getuid()).pw_name

        assert (shown.returncode, proof.returncode) == (0, 0)
        assert reads(own) == [(user, "operation=encrypt", 1), (user, f"receipt={name}", 1)]
        shutil.copytree(own.state / "audit", tmp_path / "copy")
        assert own.run_kms("audit", "tail", str(tmp_path / "copy")).returncode == 0
        assert own.run_kms("audit", "verify", "--no-anchors").returncode == 0
        assert len(reads(own)) == 2, "a copy has no log to write to, and verify shows no record"

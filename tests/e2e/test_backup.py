"""The drill of docs/disaster-recovery.md: a backup of a running service, its end, and a restore elsewhere."""

import json
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from support.cli.offline import Done, write_key
from support.credentials import REQUIRED, Guarded, bearer
from support.service import CONTEXT, b64, unb64
from support.waiting import until

ITEMS: Final = 3
PACE_S: Final = 0.02
SMALL: Final = b"config of the drill"
LARGE: Final = bytes(range(256)) * 20_000
SETTINGS: Final = f"{REQUIRED}[kms.jobs]\nlease_s = 2\n"


def kms(service: Guarded, *words: str, given: bytes = b"") -> Done:
    """The command on the host of a service, which finds its Valkey by itself."""
    argv = [sys.executable, "-P", "-m", "kms_cli.main", *words]
    environ = {name: value for name, value in service.environ.items() if name != "KMS_REDIS_URL"}
    return subprocess.run(argv, env=environ, input=given, capture_output=True, timeout=120, check=False)


def told(done: Done) -> str:
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, text
    return text


class Drill:
    """An install, the one that is restored from it, and what both must have."""

    def __init__(self, folder: Path) -> None:
        self.identity = x25519.X25519Identity.generate()
        self.key, self.archive = folder / "recovery.txt", folder / "backup.age"
        write_key(self.key, self.identity)
        self.old = Guarded(folder / "old", SETTINGS)
        self.kept, self.revoked = self.old.make("*"), self.old.make("*")
        self.new = Guarded(folder / "new", SETTINGS)
        self.ciphertext, self.said = b"", ""
        self.jobs: dict[str, str] = {}
        self.uploads: list[str] = []

    @property
    def headers(self) -> dict[str, str]:
        return bearer(self.kept[1])

    def bulk(self, service: Guarded, text: str) -> str:
        items = [{"plaintext": b64(f"{text}-{number}".encode())} for number in range(ITEMS)]
        body = {"kind": "encrypt", "context": CONTEXT, "items": items}
        answer = service.post("/jobs", body, headers=self.headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def upload(self, service: Guarded, data: bytes) -> str:
        headers = self.headers | {"X-KMS-Context": CONTEXT}
        answer = service.post("/files/encrypt", content=data, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def state(self, service: Guarded, job_id: str) -> str:
        answer = service.get(f"/jobs/{job_id}", headers=self.headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["state"])

    def decrypted(self, service: Guarded, ciphertext: bytes) -> bytes:
        body = {"ciphertext": b64(ciphertext), "context": CONTEXT}
        answer = service.post("/decrypt", body, headers=self.headers)
        assert answer.status_code == 200, answer.text
        return unb64(answer.json()["plaintext"])

    def wait(self, service: Guarded, job_id: str) -> None:
        until(lambda: self.state(service, job_id) not in {"queued", "running", "committing"}, f"job {job_id}")
        assert self.state(service, job_id) == "succeeded"

    def result(self, service: Guarded, job_id: str) -> bytes:
        self.wait(service, job_id)
        answer = service.get(f"/jobs/{job_id}/result", headers=self.headers)
        assert answer.status_code == 200, answer.text
        return answer.content

    def check_bulk(self, service: Guarded, job_id: str, text: str) -> None:
        rows = [json.loads(line) for line in self.result(service, job_id).splitlines()]
        opened = [self.decrypted(service, unb64(row["ciphertext"])).decode() for row in rows]
        assert opened == [f"{text}-{number}" for number in range(ITEMS)]


@contextmanager
def submitting(drill: Drill, service: Guarded) -> Iterator[dict[str, str]]:
    """Submit jobs all the time; yields those that were acknowledged, with their texts."""
    acknowledged: dict[str, str] = {}
    is_over = threading.Event()

    def run() -> None:
        for number in range(100_000):
            if is_over.wait(PACE_S):
                return
            acknowledged[drill.bulk(service, f"busy-{number}")] = f"busy-{number}"

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: len(acknowledged) >= 5, "jobs")
        yield acknowledged
    finally:
        is_over.set()
        thread.join()


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """The drill up to the start of the restored service."""
    folder = tmp_path_factory.mktemp("drill")
    done = Drill(folder)
    with done.old as old:
        old.start()
        told(kms(old, "token", "revoke", done.revoked[0].id))
        body = {"plaintext": b64(SMALL), "context": CONTEXT}
        done.ciphertext = unb64(old.post("/encrypt", body, headers=done.headers).json()["ciphertext"])
        done.jobs = {done.bulk(old, "ended"): "ended"}
        done.uploads = [done.upload(old, LARGE)]
        for job_id in (*done.jobs, *done.uploads):
            done.wait(old, job_id)
        with submitting(done, old) as busy:
            old.kill("worker")
            done.jobs[done.bulk(old, "queued")] = "queued"
            done.uploads.append(done.upload(old, LARGE))
            done.jobs |= dict(busy)
            recipient = done.identity.recipient.text
            done.said = told(kms(old, "backup", "-r", recipient, "-o", str(done.archive)))
    shutil.rmtree(folder / "old")
    words = (str(done.archive), "-i", str(done.key))
    done.said += told(kms(done.new, "restore", "--check", *words))
    shutil.rmtree(done.new.state)
    done.said += told(kms(done.new, "restore", *words, "--to", str(done.new.state)))
    shutil.copy(done.new.state / "kms.toml", done.new.config)
    with done.new:
        done.new.start()
        yield done


def test_jobs_that_had_ended_and_those_that_waited_have_their_results(drill: Drill) -> None:
    assert len(drill.jobs) > 6
    for job_id, text in drill.jobs.items():
        drill.check_bulk(drill.new, job_id, text)


def test_uploads_are_read_and_encrypted(drill: Drill) -> None:
    key = drill.new.state / "age/private_key.txt"
    for job_id in drill.uploads:
        sealed = drill.result(drill.new, job_id)
        opened = kms(drill.new, "open", "-i", str(key), "--context", CONTEXT, given=sealed)
        assert opened.stdout == LARGE, opened.stderr


def test_an_old_ciphertext_is_decrypted(drill: Drill) -> None:
    assert drill.decrypted(drill.new, drill.ciphertext) == SMALL


def test_a_revoked_token_stays_revoked(drill: Drill) -> None:
    for (_, text), status in ((drill.kept, 200), (drill.revoked, 401)):
        assert drill.new.get("/keys", headers=bearer(text)).status_code == status


def test_the_audit_log_is_whole_and_has_the_backup(drill: Drill) -> None:
    """Nothing is damaged, or older than its anchors. Chains that were open have no signed end."""
    report = json.loads(kms(drill.new, "audit", "verify", "--json").stdout)
    assert report["verdict"] in {"intact", "open end"}, report
    (created,) = (line for line in lines_of(drill.new, "backup.create") if line["stage"] == "intent")
    assert created["effect"].startswith(str(drill.archive))


def test_nothing_secret_is_printed_and_the_file_is_private(drill: Drill) -> None:
    assert stat.S_IMODE(drill.archive.stat().st_mode) == 0o600
    assert "backed up to" in drill.said
    assert "complete and unchanged" in drill.said
    assert "Tokens that were revoked since are valid again" in drill.said
    for secret in (drill.kept[1], drill.revoked[1], "AGE-SECRET-KEY"):
        assert secret not in drill.said


def lines_of(service: Guarded, operation: str) -> list[dict[str, str]]:
    texts = [path.read_text() for path in (service.state / "audit").glob("*.jsonl")]
    found = [json.loads(line) for text in texts for line in text.splitlines()]
    return [line for line in found if line.get("operation") == operation]

"""The drill of docs/disaster-recovery.md: a backup of a running service, its end, and a restore elsewhere."""

import json
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from support.audit_logs import AuditFolder
from support.cli.offline import write_key
from support.credentials import REQUIRED, SecuredService, bearer
from support.service import CONTEXT, b64, unb64
from support.waiting import until

ITEMS: Final = 3
PACE_S: Final = 0.02
SMALL: Final = b"config of the drill"
LARGE: Final = bytes(range(256)) * 20_000
SETTINGS: Final = f"{REQUIRED}[kms.jobs]\nlease_s = 2\n"


def told(service: SecuredService, *words: str) -> str:
    """All that the command says on the host of a service, whose Valkey it finds by itself."""
    done = service.run_kms(*words, KMS_REDIS_URL="")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Drill:
    """An install, the one that is restored from it, and what both must have."""

    def __init__(self, folder: Path) -> None:
        self.identity = x25519.X25519Identity.generate()
        self.key, self.archive = folder / "recovery.txt", folder / "backup.age"
        write_key(self.key, self.identity)
        self.old = SecuredService(folder / "old", SETTINGS)
        self.kept, self.revoked = self.old.new_token("*"), self.old.new_token("*")
        self.new = SecuredService(folder / "new", SETTINGS)
        for install in (self.old, self.new):
            install.http.headers.update(bearer(self.kept[1]))
        self.ciphertext, self.said = b"", ""
        self.jobs: dict[str, str] = {}
        self.uploads: list[str] = []


def bulk(service: SecuredService, text: str) -> str:
    items = [{"plaintext": b64(f"{text}-{number}".encode())} for number in range(ITEMS)]
    return service.submit({"kind": "encrypt", "context": CONTEXT, "items": items})


@contextmanager
def submitting(service: SecuredService) -> Iterator[dict[str, str]]:
    """Submit jobs all the time; yields those that were acknowledged, with their texts."""
    acknowledged: dict[str, str] = {}
    is_over = threading.Event()

    def run() -> None:
        for number in range(100_000):
            if is_over.wait(PACE_S):
                return
            acknowledged[bulk(service, f"busy-{number}")] = f"busy-{number}"

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
        told(old, "token", "revoke", done.revoked[0].id)
        done.ciphertext = old.encrypt(SMALL)
        done.jobs = {bulk(old, "ended"): "ended"}
        done.uploads = [old.upload("encrypt", LARGE, CONTEXT)]
        for job_id in (*done.jobs, *done.uploads):
            old.wait(job_id, "succeeded")
        with submitting(old) as busy:
            old.kill("worker")
            done.jobs[bulk(old, "queued")] = "queued"
            done.uploads.append(old.upload("encrypt", LARGE, CONTEXT))
            done.jobs |= dict(busy)
            recipient = done.identity.recipient.text
            done.said = told(old, "backup", "-r", recipient, "-o", str(done.archive))
    shutil.rmtree(folder / "old")
    words = (str(done.archive), "-i", str(done.key))
    done.said += told(done.new, "restore", "--check", *words)
    shutil.rmtree(done.new.state)
    done.said += told(done.new, "restore", *words, "--to", str(done.new.state))
    shutil.copy(done.new.state / "kms.toml", done.new.config)
    with done.new:
        done.new.start()
        yield done


def test_jobs_that_had_ended_and_those_that_waited_have_their_results(drill: Drill) -> None:
    assert len(drill.jobs) > 6
    for job_id, text in drill.jobs.items():
        drill.new.wait(job_id, "succeeded")
        rows = drill.new.lines(job_id)
        opened = [drill.new.decrypt(unb64(row["ciphertext"])).decode() for row in rows]
        assert opened == [f"{text}-{number}" for number in range(ITEMS)]


def test_uploads_are_read_and_encrypted(drill: Drill, tmp_path: Path) -> None:
    words = ("-i", str(drill.new.state / "age/private_key.txt"), "--context", CONTEXT)
    for number, job_id in enumerate(drill.uploads):
        sealed, opened = tmp_path / f"{number}.age", tmp_path / str(number)
        drill.new.wait(job_id, "succeeded")
        sealed.write_bytes(drill.new.result(job_id))
        told(drill.new, "open", *words, "-o", str(opened), str(sealed))
        assert opened.read_bytes() == LARGE


def test_an_old_ciphertext_is_decrypted(drill: Drill) -> None:
    assert drill.new.decrypt(drill.ciphertext) == SMALL


def test_a_revoked_token_stays_revoked(drill: Drill) -> None:
    for (_, text), status in ((drill.kept, 200), (drill.revoked, 401)):
        assert drill.new.get("/keys", headers=bearer(text)).status_code == status


def test_the_audit_log_is_whole_and_has_the_backup(drill: Drill) -> None:
    """Nothing is damaged, or older than its anchors. Chains that were open have no signed end."""
    done = drill.new.run_kms("audit", "verify", "--json", KMS_REDIS_URL="")
    report = json.loads(done.stdout)
    assert report["verdict"] in {"intact", "open end"}, report
    lines = [
        line for line in AuditFolder(drill.new.state).operations() if line["operation"] == "backup.create"
    ]
    (created,) = (line for line in lines if line["stage"] == "intent")
    assert created["effect"].startswith(str(drill.archive))


def test_nothing_secret_is_printed_and_the_file_is_private(drill: Drill) -> None:
    assert stat.S_IMODE(drill.archive.stat().st_mode) == 0o600
    assert "backed up to" in drill.said
    assert "complete and unchanged" in drill.said
    assert "Tokens that were revoked since are valid again" in drill.said
    for secret in (drill.kept[1], drill.revoked[1], "AGE-SECRET-KEY"):
        assert secret not in drill.said

"""Reads of the audit log are on record: by REST, on the page and by command; one record for each."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from support.audit_logs import Place
from support.credentials import REQUIRED, Guarded, bearer
from support.service import Service
from support.waiting import until

NO_REDIS: Final = "unix:///nonexistent.sock"
EAGER: Final = "[kms.audit]\ncheckpoint_s = 1\n"


def kms(service: Service, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "kms_cli.main", *args]
    return subprocess.run(argv, env=service.environ, capture_output=True, text=True, check=False, timeout=60)


def reads(service: Service) -> list[tuple[str, str, int]]:
    """Who read, with which filter, and how many records."""
    return [
        (line["principal"], line.get("filter", ""), line.get("count", 0))
        for line in Place(service.state).operations()
        if line["operation"] == "audit.read"
    ]


def test_pages_over_http_leave_one_record_each(tmp_path: Path) -> None:
    with Guarded(tmp_path, REQUIRED, NO_REDIS) as own:
        (token, text), _ = own.make("audit:read", "encrypt"), own.start("api")
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
        shown = kms(own, "audit", "tail", "--operation", "encrypt")
        proof = kms(own, "audit", "receipt", name)
        user = pwd.getpwuid(os.getuid()).pw_name

        assert (shown.returncode, proof.returncode) == (0, 0)
        assert reads(own) == [(user, "operation=encrypt", 1), (user, f"receipt={name}", 1)]
        shutil.copytree(own.state / "audit", tmp_path / "copy")
        assert kms(own, "audit", "tail", str(tmp_path / "copy")).returncode == 0
        assert kms(own, "audit", "verify", "--no-anchors").returncode == 0
        assert len(reads(own)) == 2, "a copy has no log to write to, and verify shows no record"

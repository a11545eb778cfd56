"""What a worker refuses before it knows a key is recorded all the same: a header that nobody can read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kms_core.container import Core
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import NotACiphertext
from support.core_jobs import WHO, done, run
from support.job_options import job_options
from support.job_stores import uploaded

JUNK = {"not_a_ciphertext": b"no age file", "decrypt_failed": b"age-encryption.org/v1\njunk"}


def recorded(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / "state" / "audit").rglob("*")):
        if path.is_file():
            for line in path.read_bytes().splitlines():
                if line.startswith(b"{"):
                    yield json.loads(line)


@pytest.mark.parametrize("code", JUNK)
@pytest.mark.parametrize("pattern", ["in", "i*"], ids=["one", "many"])
@pytest.mark.parametrize("kind", ["rewrap", "reseal", "decrypt"])
def test_file_whose_header_cannot_be_read(
    core: Core, tmp_path: Path, kind: wire.JobKind, pattern: str, code: str
) -> None:
    root = tmp_path / "state" / "files"
    (root / "in").write_bytes(JUNK[code])
    target = f"file://{root}/out" + ("/" if "*" in pattern else "")

    job = done(core, kind, f"file://{root}/{pattern}", target)

    assert job.state == "failed"
    found = [line for line in recorded(tmp_path) if line.get("operation") == kind]
    assert [(line["result"], line["job_id"], line["principal"]) for line in found] == [
        (code, job.job_id, "local")
    ]


@pytest.mark.parametrize("kind", ["rewrap", "decrypt"])
def test_upload_whose_header_cannot_be_read(core: Core, tmp_path: Path, kind: wire.JobKind) -> None:
    job_id = uploaded(core, job_options(WHO, kind, Context()), JUNK["decrypt_failed"])

    assert run(core, job_id).error == "decrypt_failed"
    found = [line for line in recorded(tmp_path) if line.get("operation") == kind]
    assert [(line["result"], line["job_id"]) for line in found] == [("decrypt_failed", job_id)]


@pytest.mark.parametrize(
    "body", [b"", b"age", b"hello", b"age-encryption.org/v1", b"age-encryption.org/v2\n"], ids=repr
)
@pytest.mark.parametrize("kind", ["rewrap", "decrypt"])
def test_upload_that_is_no_ciphertext_leaves_nothing(core: Core, kind: wire.JobKind, body: bytes) -> None:
    receiving = core.submitter.receive_upload(job_options(WHO, kind, Context()), len(body))
    next(receiving)

    with pytest.raises(NotACiphertext):
        receiving.send((memoryview(body), False))
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []

"""Records whose ends are signed, opened by a second implementation and told by the code of the tree."""

import json
from typing import Any, Final

import msgspec
import pytest

from kms_core.container import Core, build
from kms_core.jobs.execution import runner
from kms_core.jobs.store.store import JobStore
from support.golden import expected_ends as expected
from support.golden import make_ends, reference
from support.golden.jobs import SECRET
from support.golden.manifest import Json, unb64
from support.service import Service

HELD: Final[Json] = json.loads(expected.PATH.read_text())
LABELS: Final = {"end": expected.ENDS, "commit": expected.COMMITS, "log": expected.LOGS}


def fields(name: str) -> dict[str, bytes]:
    """The record of a job as it lay in Redis."""
    return {field: unb64(value) for field, value in HELD[name].items()}


def body(name: str, label: str) -> bytes:
    held = fields(name)
    job_id = expected.RECORDS[name]["job_id"]
    return reference.opened_bound(SECRET, label.encode(), job_id, held["sealed"], held[label])


@pytest.mark.parametrize("name", expected.RECORDS)
def test_sealed_record_says_that_its_end_is_signed(name: str) -> None:
    wanted = expected.RECORDS[name]
    found = msgspec.msgpack.decode(reference.opened_record(SECRET, wanted["job_id"], fields(name)["sealed"]))

    assert found == wanted
    assert found["signed_end"] is True


@pytest.mark.parametrize(
    ("label", "name"), [(label, name) for label, names in LABELS.items() for name in names]
)
def test_what_is_signed_is_bound_to_the_sealed_record(label: str, name: str) -> None:
    decode: Any = msgspec.json.decode if label == "commit" else msgspec.msgpack.decode
    digest = {"result_digest": expected.DIGEST} if label == "end" else {}

    assert decode(body(name, label)) == LABELS[label][name] | digest


def test_split_is_signed_with_the_records_of_its_parts() -> None:
    parts = [fields(name)["sealed"] for name in ("part-0", "part-1")]

    assert msgspec.msgpack.decode(body("whole", "split")) == {
        "parts": 2,
        "digest": reference.sha256(b"".join(parts)),
    }


@pytest.fixture
def store(held: Service) -> JobStore:
    core: Core = build(held.settings, "test", lambda *_: None)
    for name, record in expected.RECORDS.items():
        key = f"kms:job:{record['job_id']}"
        core.worker_context.store.redis.hset(key, mapping=fields(name))  # type: ignore[arg-type]  # its stubs want str keys
    return core.worker_context.store


def test_signed_ends_are_told(store: JobStore) -> None:
    file, part = store.get(expected.FILE, "acme"), store.part(expected.RECORDS["part-0"]["job_id"])

    assert (file.state, file.bytes_done) == ("succeeded", 1234)
    assert file.end
    assert file.end.target
    assert (file.end.target.inode, file.end.target.size_bytes) == (77, 1234)
    assert (part.error, part.items, part.items_failed, part.bytes) == ("items_failed", 3, 1, 300)
    assert part.end
    assert part.end.result_digest == expected.DIGEST


def test_whole_is_ended_from_the_signed_ends_of_its_parts(store: JobStore) -> None:
    """Of the part that was given up, the log settles one file of two."""
    job = runner.end_parent(store.get(expected.WHOLE, "acme"), store)

    assert (job.state, job.error, job.items, job.items_failed) == ("failed", "items_failed", 5, 2)
    assert (job.tallies["changed"], job.tallies["found payroll/0a1b2c3d"]) == (3, 3)
    assert job.bytes_done == 500


def test_commit_is_taken_up(store: JobStore) -> None:
    claim = store.claim(expected.COMMITTING, "w/1")

    assert claim
    assert claim.commit
    assert (claim.commit.inode, claim.commit.replaces) == (77, (78, 1000, 5))


def test_the_set_is_never_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_ends.main() == 1
    assert "never made again" in capsys.readouterr().err

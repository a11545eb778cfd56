"""Sealed records that say their kind, opened by a second implementation and by the code of the tree."""

import json
from typing import Final

import msgspec
import pytest

from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.spec import FileJob, ItemsJob, TreeJob, TreePart, UploadJob
from support.golden import expected_records as expected
from support.golden import make_records, reference
from support.golden.jobs import SECRET
from support.golden.manifest import unb64

HELD: Final[dict[str, str]] = json.loads(expected.PATH.read_text())
FORMS: Final = {
    "upload": UploadJob,
    "items": ItemsJob,
    "items-part": ItemsJob,
    "file": FileJob,
    "tree": TreeJob,
    "tree-part": TreePart,
}


@pytest.mark.parametrize("name", expected.RECORDS)
def test_record_has_the_fields_of_its_kind(name: str) -> None:
    wanted = expected.RECORDS[name]
    body = reference.opened_record(SECRET, wanted["job_id"], unb64(HELD[name]))

    assert msgspec.msgpack.decode(body) == wanted


@pytest.mark.parametrize("name", expected.RECORDS)
def test_record_opens_as_its_kind(name: str) -> None:
    wanted = expected.RECORDS[name]
    found = RecordKey((SECRET,)).open(wanted["job_id"], unb64(HELD[name]))

    assert type(found) is FORMS[name]
    known = {field: value for field, value in wanted.items() if field != "signed_end"}  # all are, by now
    assert msgspec.json.encode(found, order="sorted") == msgspec.json.encode(known, order="sorted")
    assert (found.queue, found.owner) == (expected.QUEUES[name], wanted.get("parent", wanted["job_id"]))


def test_the_set_is_never_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_records.main() == 1
    assert "never made again" in capsys.readouterr().err

"""Blobs with MACs, checked by a second implementation and read by the code of the tree."""

import json
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.spec import UploadJob
from kms_core.jobs.storage.disk_sync import DiskSync
from kms_core.jobs.storage.spool import Label, Spool
from kms_core.jobs.storage.spool_folder import SpoolFolder
from kms_protocol.errors import RecordRefused
from support.golden import expected_blobs as expected
from support.golden import make_blobs, manifest, reference
from support.golden.jobs import SECRET
from support.golden.manifest import unb64

HELD: Final[dict[str, Any]] = json.loads(expected.PATH.read_text())
NAMES: Final = (*expected.AS_THEY_ARE, *expected.SEALED)


def stored(name: str) -> bytes:
    """The file as it lay in the spool. What rests as it is is not held twice."""
    return expected.AS_THEY_ARE.get(name, b"") + unb64(HELD[name]["stored"])


def ref(name: str) -> bytes:
    return unb64(HELD[name]["ref"])


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    key = AgeBackend(KeyFiles(manifest.copied("keys/spool.txt", tmp_path)))
    folder = tmp_path / "spool" / expected.JOB_ID
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(stored(name))
    return Spool(SpoolFolder(folder.parent, DiskSync(folder.parent)), key, RecordKey((SECRET,)), 1)


def label(name: str) -> Label:
    tenant, job_id, role, attempt = expected.names(name)
    return Label(tenant, job_id, role, attempt, ref(name))


@pytest.mark.parametrize("name", NAMES)
def test_macs_are_those_of_version_2(name: str) -> None:
    content = reference.blob_content(SECRET, expected.names(name), ref(name), stored(name))

    assert content == expected.AS_THEY_ARE.get(name, content)
    with pytest.raises(reference.Broken):
        reference.blob_content(SECRET, expected.names("upload.9"), ref(name), stored(name))


@pytest.mark.parametrize("name", NAMES)
def test_blob_with_macs_is_read(spool: Spool, name: str) -> None:
    at = label(name)
    if name in expected.AS_THEY_ARE:
        with spool.blob(at) as blob:
            assert blob.file.read_at(0, blob.file.size) == expected.AS_THEY_ARE[name]
    else:
        with spool.opened(at) as reader:
            assert reader.read(0, reader.size) == expected.PLAIN


def test_blob_of_another_name_is_refused(spool: Spool, tmp_path: Path) -> None:
    folder = tmp_path / "spool" / expected.JOB_ID
    (folder / "upload").write_bytes(stored("head.3"))

    with pytest.raises(RecordRefused), spool.blob(label("upload")):
        pytest.fail("it was opened")


def test_record_names_its_blob() -> None:
    sealed = unb64(HELD["record"]["sealed"])
    found = msgspec.msgpack.decode(reference.opened_record(SECRET, expected.JOB_ID, sealed))

    assert found == expected.RECORD | {"input_ref": ref("upload")}
    job = RecordKey((SECRET,)).open(expected.JOB_ID, sealed)
    assert isinstance(job, UploadJob)
    assert job.input_ref == ref("upload")


def test_the_set_is_never_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_blobs.main() == 1
    assert "never made again" in capsys.readouterr().err

"""Jobs as an earlier version left them in Redis, spool and broker, opened by the code of the tree.

Sealed records and MACs are also opened by ``golden.reference``, and compared with ``golden.expected_jobs``,
which is written by hand.
"""

import json
import uuid
from pathlib import Path
from typing import Final

import msgspec
import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import results, tree
from kms_core.jobs.file_patterns import Tree
from kms_core.jobs.model import part_id
from kms_core.jobs.spec import ItemsJob, TreePart
from kms_core.jobs.storage.disk_sync import DiskSync
from kms_core.jobs.storage.local_paths import temporary_name
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.jobs.storage.spool import NO_ATTEMPT, Label
from kms_core.jobs.storage.spool_folder import SpoolFolder
from kms_core.jobs.store.store import JobStore
from kms_core.s3 import bucket
from kms_protocol.context import Context
from support.golden import expected_jobs as expected
from support.golden import manifest, reference
from support.golden.jobs import BLOBS, IDS, SECRET, fields, is_sealed_by_the_spool, record
from support.golden.manifest import SMALL, unb64
from support.service import Service

PARTS: Final = uuid.UUID("6f1f3c4e-0d0a-5c0b-9a57-6b6d732d7061")
WHO: Final = Principal("local", "default", "none")


# -- records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", expected.RECORDS)
def test_sealed_record_is_of_version_1(name: str) -> None:
    job_id = IDS[name]
    found = record(job_id)
    wanted = expected.RECORDS[name]

    volatile = expected.VOLATILE | ({"size_bytes", "starts"} - wanted.keys())
    assert {key: value for key, value in found.items() if key not in volatile} == wanted
    assert found["job_id"] == job_id
    assert int(found["expires_at"]) == expected.FAR


@pytest.mark.parametrize("name", expected.RECORDS)
def test_sealed_record_opens(store: JobStore, name: str) -> None:
    found = msgspec.to_builtins(store.accepted(IDS[name]))

    wanted = expected.RECORDS[name] | {"job_id": IDS[name]}
    assert {key: _lists(found[key]) for key in wanted} == wanted


def _lists(value: object) -> object:
    """Tuples as JSON and MessagePack have them."""
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", expected.RECORDS)
def test_plain_fields_are_read(store: JobStore, name: str) -> None:
    job = store.part(IDS[name])

    assert job.state == expected.STATES.get(name, "queued")
    assert (job.tenant, job.kind) == (expected.RECORDS[name]["tenant"], expected.RECORDS[name]["kind"])
    assert int(job.expires_at) == expected.FAR


def test_counts_and_ends_are_read(store: JobStore) -> None:
    whole, part = store.get(IDS["campaign"], "acme"), store.part(IDS["campaign-part"])
    done, dead = store.get(IDS["done-items"], "default"), store.get(IDS["dead"], "acme")

    assert (whole.campaign, whole.parts, whole.items, whole.bytes) == ("wet", 1, 4, 303)
    assert part.tallies == {"changed": 1, "found payroll/0a1b2c3d": 1}
    assert (done.items_done, done.bytes_done, done.fence, done.attempt) == (1, 86, 1, 1)
    assert dead.error == "attempts_exhausted"
    for key in store.lists():  # as a worker does when it starts
        assert store.trim(key, 0)[0] == 0
    assert [job.job_id for job in store.dead("acme", 10)] == [IDS["dead"]]
    assert {job.job_id for job in store.page("acme", state=None, limit=50, before=None)[0]} == {
        IDS[name]
        for name, wanted in expected.RECORDS.items()
        if wanted["tenant"] == "acme" and "parent" not in wanted
    }


@pytest.mark.parametrize("name", expected.COMMITS)
def test_commit_opens(store: JobStore, name: str) -> None:
    job_id, signed = IDS[name], fields(IDS[name])["commit"]
    body = reference.opened_signed(SECRET, b"commit", job_id, signed)

    assert json.loads(body) == expected.COMMITS[name]
    assert (
        json.loads(msgspec.json.encode(store.record_key.open_commit(job_id, signed)))
        == expected.COMMITS[name]
    )


def test_log_of_a_part_opens(store: JobStore) -> None:
    job_id = IDS["campaign-part"]
    body = reference.opened_signed(SECRET, b"log", job_id, fields(job_id)["log"])

    assert msgspec.msgpack.decode(body) == expected.LOG
    assert json.loads(msgspec.json.encode(store.log_of(job_id))) == expected.LOG


def test_parts_have_the_ids_of_version_1(store: JobStore) -> None:
    for name in ("split", "campaign"):
        first = str(uuid.uuid5(PARTS, f"{IDS[name]}/0"))
        assert part_id(IDS[name], 0) == first
        assert store.accepted(first).parent == IDS[name]
    part = store.accepted(str(uuid.uuid5(PARTS, f"{IDS['split']}/1")))
    assert isinstance(part, ItemsJob)
    assert (part.part, part.items, len(part.starts)) == (1, 1, 1)


def test_manifest_of_a_campaign_opens(unchanged: Core) -> None:
    part = unchanged.worker_context.store.accepted(IDS["campaign-part"])
    assert isinstance(part, TreePart)
    found = [
        (one.path, one.size_bytes, one.code) for one in tree.entries(part, unchanged.worker_context.spool)
    ]

    assert found == [
        ("x/0.age", 100, ""),
        ("x/1.age", 101, ""),
        ("x/2.age", 102, ""),
        ("y", 0, "path_refused"),
    ]
    file = tree.file_job(part, Tree.parse(part.source), found[1][0], 1)
    assert file.job_id == str(uuid.uuid5(uuid.UUID(part.job_id), "1"))


# -- the spool ---------------------------------------------------------------------------------------


def _label(path: Path) -> Label:
    role, _, attempt = path.name.partition(".")
    job_id = path.parent.name
    return Label(record(job_id)["tenant"], job_id, role, attempt or NO_ATTEMPT)


@pytest.mark.parametrize(
    "path", [path for path in BLOBS if is_sealed_by_the_spool(path)], ids=lambda path: path.name
)
def test_blob_opens(unchanged: Core, path: Path) -> None:
    label, data = _label(path), path.read_bytes()
    native, context, origin = reference.unverified_stanzas(data)
    secret = manifest.identity_secret("spool")
    file_key = reference.x25519_file_key(secret, native)
    key = reference.Names(label.tenant, "spool", context.args[3], "age")
    bound = {"attempt": label.attempt, "job": label.job_id, "role": label.role}
    nonce = data[data.index(b"\n--- ") + 49 :][:16]

    reference.parsed(data, file_key)
    assert context.body == reference.context_tag(file_key, reference.decoded(context.args[4]), key, bound)
    assert origin.body == reference.origin_tag(SECRET, file_key, nonce, key, bound)
    with unchanged.worker_context.spool.blob(label) as blob:
        assert unchanged.worker_context.spool.unseal(label, blob.head) == file_key


def test_every_role_of_a_blob_is_held() -> None:
    assert {path.name for path in BLOBS} == {"upload", "items", "head.1", "result0.1", "files.1"}


def result_of(core: Core, name: str) -> bytes:
    store = core.worker_context.store
    found = results.of(store.get(IDS[name], "default"), store, core.worker_context.spool)
    return b"".join(bytes(piece) for piece in found.slabs(0, found.size))


def test_results_are_read(unchanged: Core) -> None:
    context = Context.parse("env=prod,service=api")
    line = json.loads(result_of(unchanged, "done-items"))
    uploaded = unchanged.kms.decrypt(WHO, result_of(unchanged, "done-upload-encrypt"), context)

    assert uploaded.plaintext == expected.UPLOADED
    assert result_of(unchanged, "done-upload-decrypt") == SMALL
    assert unchanged.kms.decrypt(WHO, unb64(line["ciphertext"]), context).plaintext == SMALL


def test_note_of_a_multipart_upload_is_found(held: Service) -> None:
    notes = MultipartJournal(SpoolFolder(held.spool, DiskSync(held.spool)))

    assert notes.find(IDS["object-encrypt"], "1", "s3://archive/in.bin.age") == "upload-1"


def test_names_in_places_of_others_are_those_of_version_1() -> None:
    assert bucket.MARK == "x-amz-meta-kms-job"
    assert temporary_name("a-1") == ".kms-a-1.tmp"

"""What the code of the tree writes is of version 1: an older reader, ``golden.reference``, opens it.

The other tests read what is stored. A label or a version that only the writing side uses would pass them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kms_core.age.x25519 import X25519Identity
from kms_core.backends import KeyVersion
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.backends.remote import RemoteBackend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.http_client import PeerServer
from kms_core.jobs.events.webhook import WebhookRequest, sign
from kms_core.jobs.model import Checkpoint, Commit, RecordKey
from kms_core.jobs.spec import ItemsJob, SignedEnd, SignedSplit, UploadJob, spec_digest
from kms_core.jobs.storage import commit_marks
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.jobs.storage.local import temporary_name
from kms_core.jobs.storage.spool import Label, Spool
from kms_core.jobs.storage.spool_folder import DiskSync, SpoolFolder
from kms_core.jobs.store import wake_ups
from kms_core.s3 import bucket
from kms_protocol.context import Context
from support.golden import golden_set, reference
from support.golden.golden_set import SMALL
from support.golden.jobs import SECRET as SPOOL_SECRET
from support.golden.reference import Names, Stanza

BOUND: Final[Mapping[str, str]] = {"env": "prod", "größe": "drei"}
KEY: Final = Names("acme", "payroll", "v-7", "seen")
SECRET: Final = bytes(range(32))
JOB_ID: Final = "00000000-0000-4000-8000-0000000000ff"


SERVER: Final = PeerServer("http://seen.test", "seen", "kms.seen.address", 5.0)


@dataclass
class RecordingPeer:
    """A peer that hands back what it was asked to wrap, and keeps the AAD."""

    name: str = "seen"
    token: None = None
    server: PeerServer = SERVER
    asked: list[tuple[bytes, str, bytes]] = field(default_factory=list)

    def encrypt(self, secret: bytes, version: str, aad: bytes) -> bytes:
        self.asked.append((secret, version, aad))
        return secret

    def decrypt(self, wrapped: bytes, version: str, aad: bytes) -> bytes:
        assert (wrapped, version, aad) in self.asked
        return wrapped

    def versions(self) -> list[KeyVersion]:
        return [KeyVersion("v-7")]

    def rotate(self) -> KeyVersion:
        raise NotImplementedError


@pytest.fixture
def peer() -> RecordingPeer:
    return RecordingPeer()


def ref() -> KeyRef:
    return KeyRef(KEY.tenant, KEY.key_id, KEY.version, KEY.backend)


def opened(file: bytes, file_key: bytes) -> list[Stanza]:
    assert reference.opened_file(file, file_key) == SMALL
    return reference.parsed(file, file_key)


def context_body(stanza: Stanza, file_key: bytes, key: Names) -> bytes:
    kind, version, key_id, key_version, salt = stanza.args
    assert (kind, version, key_id, key_version) == ("kms-service/context", "1", key.key_id, key.version)
    assert stanza.body == reference.context_tag(file_key, reference.decoded(salt), key, BOUND)
    return stanza.body


def test_new_remote_wrap(peer: RecordingPeer) -> None:
    file = sealing.seal(SMALL, [(RemoteBackend(peer), ref())], Context.parse(BOUND))
    ((file_key, version, aad),) = peer.asked
    wrap, context = opened(file, file_key)

    assert wrap == Stanza(("kms-service/wrap", "seen", "payroll", "v-7"), file_key)
    assert (version, aad) == ("v-7", reference.wrap_aad(KEY, context_body(context, file_key, KEY)))


def test_new_wrap_of_a_bulk_job(peer: RecordingPeer) -> None:
    file = sealing.seal(SMALL, [(RemoteBackend(peer).for_job(), ref())], Context.parse(BOUND))
    ((job_key, _, aad),) = peer.asked
    wrap, context = reference.unverified_stanzas(file)
    wrap_aad = reference.wrap_aad(KEY, context.body)
    file_key = reference.salted_open(job_key, b"kms-service/job/1", wrap.body, wrap_aad)

    assert wrap.args == ("kms-service/wrap", "seen", "payroll", "v-7", reference.unpadded(job_key))
    assert aad == reference.job_aad(KEY)
    context_body(opened(file, file_key)[1], file_key, KEY)


@pytest.fixture
def identity() -> X25519Identity:
    return X25519Identity.generate()


def test_new_origin_with_and_without_nonce(identity: X25519Identity) -> None:
    file_key, nonce, mac_key = bytes(16), bytes(range(16)), binding.origin_key(identity.secret)
    bound = Context.parse(BOUND)

    assert mac_key == reference.origin_key(identity.secret)
    for given, version in ((nonce, "1"), (None, "2")):
        stanza = binding.origin_stanza(mac_key, file_key, given, key=ref(), context=bound)
        tag = reference.origin_tag(mac_key, file_key, given, KEY, BOUND)
        assert (stanza.args, stanza.body) == (("kms-service/origin", version), tag)


def test_new_bundle(peer: RecordingPeer) -> None:
    made = sealing.wrap_for_plugin(bytes(16), [(RemoteBackend(peer), ref())], Context.parse(BOUND))

    assert made.args == ("kms-service/bundle", "1")
    inner = [one.args[0] for one in reference.stanzas_of(made.body)]
    assert inner == ["kms-service/wrap", "kms-service/context"]


def test_new_pad(peer: RecordingPeer) -> None:
    made = sealing.begin([(RemoteBackend(peer), ref())], Context.parse(BOUND), padded=True)
    pad = reference.parsed(made.head, peer.asked[0][0])[-1]

    assert len(made.header) == 4096
    assert (pad.args[0], set(pad.args[1]), pad.body) == ("kms-service/pad", {"0"}, b"")


# -- jobs --------------------------------------------------------------------------------------------


FIELDS: Final[dict[str, Any]] = {
    "job_id": JOB_ID,
    "tenant": "acme",
    "principal": "ada",
    "credential": "none",
    "kind": "encrypt",
    "created_at": 1.0,
    "expires_at": 2.0,
    "start_by": 2.0,
    "run_by": 2.0,
}
ACCEPTED: Final = UploadJob(**FIELDS, context=(("env", "prod"),))


def test_new_record() -> None:
    older = bytes(32)
    sealed = RecordKey((older, SECRET)).seal(ACCEPTED)

    stored = FIELDS | {"form": "upload", "context": [["env", "prod"]]}
    assert msgspec.msgpack.decode(reference.opened_record(SECRET, JOB_ID, sealed)) == stored
    assert RecordKey((older, SECRET)).open(JOB_ID, _by_reference(SECRET)) == ACCEPTED
    assert RecordKey((older, SECRET)).open(JOB_ID, _by_reference(older)) == ACCEPTED


def _by_reference(secret: bytes) -> bytes:
    return reference.sealed_record(secret, JOB_ID, bytes(32), msgspec.msgpack.encode(ACCEPTED))


def test_new_record_of_an_idempotency_key() -> None:
    """It holds the digest that the Redis key of the Idempotency-Key is named by."""
    key = RecordKey((SECRET,))
    asked = key.digest(b"acme ada jobs golden-1")
    sealed = key.seal(msgspec.structs.replace(ACCEPTED, idempotency=asked))

    found = msgspec.msgpack.decode(reference.opened_record(SECRET, JOB_ID, sealed))
    assert found["idempotency"] == reference.digest(SECRET, b"acme ada jobs golden-1")
    assert key.open(JOB_ID, sealed).idempotency == found["idempotency"]


def test_new_jobs_wait_in_the_queues_of_version_1() -> None:
    queues = {"encrypt": "kms.files", "rewrap": "kms.maintenance"}
    for kind, queue in queues.items():
        assert msgspec.structs.replace(ACCEPTED, kind=kind).queue == queue
    of_items = msgspec.structs.asdict(ACCEPTED) | {"items": 1, "starts": (0,)}
    del of_items["input_ref"]
    assert ItemsJob(**of_items).queue == "kms.bulk"


def test_new_digest() -> None:
    """Of the first secret, so that a rotation changes none."""
    key = RecordKey((SECRET, bytes(32)))

    assert key.digest(b"a", b"bc") == reference.digest(SECRET, b"a", b"bc")


def test_new_blob(tmp_path: Path) -> None:
    """An age file under the secret of the spool identity, bound to its names and the id of its writing."""
    key = AgeBackend(KeyFiles(golden_set.copied("keys/spool.txt", tmp_path)), native=False)
    spool = Spool(SpoolFolder(tmp_path, DiskSync(tmp_path)), key, 1 << 30)
    with spool.writing(Label("acme", JOB_ID, "head", "3")) as out:
        out.write(SMALL)
    data = (tmp_path / JOB_ID / "head.3").read_bytes()
    wrap, context, origin = reference.unverified_stanzas(data)
    names = Names("acme", "spool", context.args[3], "age")
    aad = reference.wrap_aad(names, context.body)
    secret = golden_set.identity_secret("spool")
    file_key = reference.salted_open(secret, b"kms-service/wrap-age/1", wrap.body, aad)
    bound = {"attempt": "3", "job": JOB_ID, "role": "head", "write": out.ref.hex()}
    nonce = data[data.index(b"\n--- ") + 49 :][:16]

    assert reference.opened_file(data, file_key) == SMALL
    assert context.body == reference.context_tag(file_key, reference.decoded(context.args[4]), names, bound)
    assert origin.body == reference.origin_tag(SPOOL_SECRET, file_key, nonce, names, bound)


def test_signature_of_a_delivery_is_that_of_version_1() -> None:
    message = WebhookRequest("d-1", "j-1", b'{"a":1}')
    expected_mac = reference.hmac_sha256(SECRET, b'1700000000.d-1.j-1.{"a":1}').hex()

    assert sign(SECRET, 1_700_000_000, message) == f"v1={expected_mac}"


def test_names_in_places_of_others_are_those_of_version_1() -> None:
    assert bucket.MARK == "x-amz-meta-kms-job"
    assert temporary_name("a-1") == ".kms-a-1.tmp"


def test_new_bound_records() -> None:
    """Commit, log, list of parts and end are bound to the sealed record."""
    key = RecordKey((SECRET, bytes(32)))
    sealed = key.seal(ACCEPTED)
    spec, end = spec_digest(sealed), SignedEnd(fence=1, attempt=2, state="succeeded", kept_until=3.0)
    made = {
        b"commit": key.sign(JOB_ID, Commit(attempt_id="a", size_bytes=2), spec),
        b"log": key.sign(JOB_ID, Checkpoint(words=("done",), outcomes=(0,)), spec),
        b"split": key.sign(JOB_ID, SignedSplit(parts=1, digest=spec_digest(b"ab", b"c")), spec),
        b"end": key.sign(JOB_ID, end, spec),
    }
    bodies = {
        label: msgspec.msgpack.decode(reference.authenticated(SECRET, label, JOB_ID, sealed, signed))
        for label, signed in made.items()
    }

    assert (bodies[b"commit"]["size_bytes"], bodies[b"log"]["words"]) == (2, ["done"])
    assert bodies[b"split"] == {"parts": 1, "digest": reference.sha256(b"abc")}
    assert bodies[b"end"] == {"fence": 1, "attempt": 2, "state": "succeeded", "kept_until": 3.0}


@pytest.mark.parametrize(("url", "facts"), [("file:///out", (7, 8, 9)), ("s3://bucket/out", ())])
def test_new_commit_mark(tmp_path: Path, url: str, facts: tuple[int, ...]) -> None:
    """Of a file, with its inode, size and mtime, and of an object."""
    spool = SpoolFolder(tmp_path, DiskSync(tmp_path))
    marks = CommitMarks(RecordKey((SECRET, bytes(32))), JOB_ID, b"spec", "file:///in", spool)

    mark = marks.sign("attempt", url, *facts)

    texts = (JOB_ID, "attempt", "file:///in", url, *map(str, facts))
    mac = reference.digest(SECRET, b"commit-mark", b"spec", *(text.encode() for text in texts))
    assert mark == f"{JOB_ID}/attempt/{mac.hex()}"
    assert commit_marks.ATTRIBUTE == "user.kms.commit"


def test_new_message() -> None:
    found = msgspec.json.decode(wake_ups.encode_message("kms.files"))

    assert wake_ups.list_key("kms.files") == "kms:kms.files"
    assert found == {
        "body": "[[],{},null]",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "kms.run", "id": "wake-up"},
        "properties": {
            "delivery_tag": "wake-up",
            "delivery_info": {"exchange": "", "routing_key": "kms.files"},
            "priority": 0,
        },
    }


def test_reference_reads_the_golden_set() -> None:
    """Or the tests above would compare with nothing."""
    entry = golden_set.entry("age-x25519/small-bound")

    assert reference.opened_file(entry.file, entry.file_key) == SMALL
    with pytest.raises(reference.Broken):
        reference.opened_file(entry.file, bytes(16))

"""Makes the jobs of a golden set: records, broker messages, spool and outbox; run by ``support.golden.make``.

A core of the tree over a Valkey of its own. Jobs whose run needs nothing but the spool are accepted by the
submission code; those over files, whose paths no other machine has, are stored as the model has them.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec
from celery import Celery

from kms_core.age.recipients import parse_identity
from kms_core.auth.policy import Principal
from kms_core.container import Core, build
from kms_core.jobs.events.outbox import Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.execution.tree import MANIFEST
from kms_core.jobs.model import Attempt, Checkpoint, Commit, part_id
from kms_core.jobs.spec import JobSpec, of_flat
from kms_core.jobs.storage.disk_sync import DiskSync
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.jobs.storage.spool import UPLOAD, Label
from kms_core.jobs.storage.spool_folder import SpoolFolder
from kms_core.jobs.submission.deadlines import Deadlines
from kms_core.jobs.submission.submitter import ClientJobId, SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from support.celery_messages import OPTIONS, seal
from support.embedded_valkey import unrestricted
from support.golden import expected_jobs, install, manifest, redisdump
from support.golden.manifest import b64
from support.service import Service

FAR: Final = 4_102_444_800  # 2100-01-01, when every record here ends
WHO: Final = Principal("local", "default", "none")
CONTEXT: Final = {"env": "prod", "service": "api"}
NEW: Final = {"env": "archive"}
SEALED: Final = "age-x25519/default-key"
"""The entry that jobs decrypt, rewrap and reseal."""

SPLIT_ITEMS: Final = 501
UPLOADED: Final = b"an upload of the golden set\n" * 40
HOOK_SECRET: Final = b"golden-golden-golden-golden-secret\n"
INTAKE_ID: Final = "00000000-0000-4000-8000-0000000000a1"
PLACE: Final = "file:///srv/golden"


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    with TemporaryDirectory(prefix="kms-golden-") as scratch, unrestricted(Path(scratch)) as url:
        (Path(scratch) / "hook").write_bytes(HOOK_SECRET)
        settings = f"[kms.jobs.endpoints.ci]\nurl = 'http://127.0.0.1:9/'\nsecret_file = '{scratch}/hook'\n"
        made = install.service(Path(scratch) / "install", url, settings)
        core = build(made.settings, "api", None)
        maker = _Maker(core, made)
        maker.make()
        dump = redisdump.dumped(core.worker_context.store.redis)
        dump["kms:kms.submit"]["value"] = list(map(_without_host, dump["kms:kms.submit"]["value"]))
        (folder / "redis.json").write_text(json.dumps(dump, indent=1) + "\n")
        (folder / "ids.json").write_text(json.dumps(maker.ids, indent=1) + "\n")
        shutil.copytree(made.spool, folder / "spool")


def _without_host(text: str) -> str:
    """A message whose header ``origin``, which nothing reads, names no real machine."""
    message = json.loads(manifest.unb64(text))
    message["headers"]["origin"] = "gen1@workflow"
    return b64(json.dumps(message).encode())


class _Maker:
    def __init__(self, core: Core, made: Service) -> None:
        self._core, self._install = core, made
        self._store = core.worker_context.store
        self.ids: dict[str, str] = {}

    def make(self) -> None:
        self._queued_uploads()
        self._queued_items()
        self._run_jobs()
        self._split()
        self._intake()
        self._files()
        self._tree()
        self._objects()
        self._ended()
        self._outbox()
        self._broker()

    # -- by the submission code ------------------------------------------------------------------------

    def _terms(
        self, kind: wire.JobKind, context: Mapping[str, str] = CONTEXT, **more: object
    ) -> SubmissionOptions:
        fields: dict[str, object] = {"deadlines": Deadlines(ttl_s=FAR - int(time.time())), "who": WHO} | more
        return SubmissionOptions(kind=kind, context=Context.parse(context), **fields)  # type: ignore[arg-type]  # fields by name

    def _upload(self, name: str, terms: SubmissionOptions, body: bytes) -> str:
        job_id = terms.job_id()
        label = Label(terms.who.tenant, job_id, UPLOAD)
        with self._core.submitter.spool.writing(label, sealed=terms.kind == "encrypt") as out:
            out.write(body)
        hasher = self._core.submitter.hasher(terms)
        hasher.update(body)
        self._core.submitter.upload(terms, job_id, len(body), hasher.digest(), out)
        self.ids[name] = job_id
        return job_id

    def _queued_uploads(self) -> None:
        self._upload("upload-encrypt", self._terms("encrypt", key_id="default"), UPLOADED)
        file = manifest.entry(SEALED).file
        self._upload("upload-decrypt", self._terms("decrypt", {}), file)
        self._upload("upload-rewrap", self._terms("rewrap", {}, new_context=Context.parse(NEW)), file)

    def _items(self, name: str, terms: SubmissionOptions, items: list[wire.JobItem]) -> str:
        self.ids[name] = self._core.submitter.items(terms, items).job_id
        return self.ids[name]

    def _queued_items(self) -> None:
        plain = [wire.JobItem(plaintext=manifest.SMALL), wire.JobItem(plaintext=b"own", context=NEW)]
        terms = self._terms("encrypt", idempotency="golden-1", callback="ci", priority="high")
        self._items("items-encrypt", terms, plain)
        sealed = [wire.JobItem(ciphertext=manifest.entry(SEALED).file)]
        self._items("items-decrypt", self._terms("decrypt", {}, priority="low"), sealed)
        kinds: tuple[wire.JobKind, ...] = ("rewrap", "reseal")
        for kind in kinds:
            terms = self._terms(kind, {}, new_context=Context.parse(NEW))
            self._items(f"items-{kind}", terms, sealed)

    def _run_jobs(self) -> None:
        """Jobs that have ended, whose results lie in the spool."""
        file = manifest.entry(SEALED).file
        ids = [
            self._upload("done-upload-encrypt", self._terms("encrypt", callback="ci"), UPLOADED),
            self._upload("done-upload-decrypt", self._terms("decrypt", {}), file),
            self._items("done-items", self._terms("encrypt"), [wire.JobItem(plaintext=manifest.SMALL)]),
        ]
        for job_id in ids:
            run_job(job_id, self._core.worker_context, "golden/1")

    def _split(self) -> None:
        """A whole whose two parts wait."""
        items = [wire.JobItem(plaintext=b"%d" % number) for number in range(SPLIT_ITEMS)]
        run_job(self._items("split", self._terms("encrypt"), items), self._core.worker_context, "golden/1")

    def _intake(self) -> None:
        """Named by its submitter, with the digest that the intake makes."""
        digest = self._store.record_key.digest(b"kms.submit", expected_jobs.INTAKE_CANONICAL)
        terms = self._terms("encrypt", who=Principal("celery"), named=ClientJobId(INTAKE_ID, digest))
        self._items("intake", terms, [wire.JobItem(plaintext=b"by a workflow")])

    # -- as the model has them ---------------------------------------------------------------------------

    def _accepted(self, name: str, kind: wire.JobKind, source: str, target: str, **more: object) -> JobSpec:
        self.ids[name] = f"00000000-0000-4000-8000-{len(self.ids):012x}"
        fields: dict[str, object] = {
            "job_id": self.ids[name],
            "tenant": "acme",
            "principal": "golden",
            "credential": "token:abcdefghij",
            "context": tuple(CONTEXT.items()),
            "request_id": "req-golden",
            "created_at": 1_790_000_000.25,
            "expires_at": float(FAR),
        } | more
        made = of_flat({"kind": kind, "source": source, "target": target, **fields})
        self._store.submit(made)
        return made

    def _claimed(self, made: JobSpec) -> Attempt:
        claim = self._store.claim(made.job_id, "golden/1")
        if claim is None:
            raise RuntimeError(made.job_id)
        return claim

    def _files(self) -> None:
        grant = {
            "credential": "jwt:ci:0a1b",
            "scopes": ("encrypt", "jobs:write"),
            "authorized_until": float(FAR),
        }
        self._accepted("file-encrypt", "encrypt", f"{PLACE}/a.txt", f"{PLACE}/a.txt.age", **grant)
        self._accepted(
            "file-reseal", "reseal", f"{PLACE}/b.age", f"{PLACE}/c.age", new_context=tuple(NEW.items())
        )
        traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "overwrite": True}
        made = self._accepted("file-committing", "rewrap", f"{PLACE}/d.age", f"{PLACE}/d.age", **traced)
        claim = self._claimed(made)
        commit = Commit(
            attempt_id=claim.attempt_id,
            size_bytes=1234,
            inode=77,
            mtime_ns=1_790_000_000_123_456_789,
            replaces=(78, 1000, 5),
        )
        self._store.committing(claim, commit)

    def _tree(self) -> None:
        """A campaign in place over three files: one settled, one pending, one to come."""
        made = self._accepted(
            "campaign",
            "rewrap",
            f"{PLACE}/**/*.age",
            f"{PLACE}/**/*.age",
            overwrite=True,
            rate_per_s=2.5,
            key_id="payroll",
        )
        claim = self._claimed(made)
        lines = [b'{"path":"x/%d.age","size_bytes":%d}\n' % (number, 100 + number) for number in range(3)]
        lines.append(b'{"path":"y","code":"path_refused"}\n')
        with self._core.submitter.spool.writing(
            Label("acme", made.job_id, MANIFEST, claim.attempt_id)
        ) as out:
            out.write(b"".join(lines))
        self._step(claim, self._part(made, claim, sum(map(len, lines))))
        self._accepted(
            "campaign-dry", "reseal", f"{PLACE}/*.age", f"{PLACE}/*.age", overwrite=True, dry_run=True
        )
        self._accepted("tree-encrypt", "encrypt", f"{PLACE}/in/**", f"{PLACE}/out/")

    def _step(self, whole: Attempt, part: JobSpec) -> None:
        """Split the campaign, and bring its part to the commit of its second file."""
        self._store.split(whole, [part])
        self.ids["campaign-part"] = part.job_id
        held = self._claimed(part)
        pending = Commit(
            attempt_id=held.attempt_id, size_bytes=102, inode=9, mtime_ns=8, replaces=(7, 101, 6)
        )
        log = Checkpoint(
            words=("changed payroll/0a1b2c3d",), outcomes=(0,), pending=pending, effect="changed"
        )
        self._store.step(held, log, {"settled": 1, "tally:changed": 1, "tally:found payroll/0a1b2c3d": 1})

    def _part(self, made: JobSpec, claim: Attempt, size: int) -> JobSpec:
        fields = {name: getattr(made, name) for name in made.__struct_fields__}
        part = {
            "job_id": part_id(made.job_id, 0),
            "parent": made.job_id,
            "manifest": claim.attempt_id,
            "items": 4,
            "starts": (0, size),
            "size_bytes": 303,
        }
        return of_flat(fields | part)

    def _objects(self) -> None:
        made = self._accepted("object-encrypt", "encrypt", "s3://archive/in.bin", "s3://archive/in.bin.age")
        claim = self._claimed(made)
        commit = Commit(
            attempt_id=claim.attempt_id, size_bytes=9, upload="upload-1", parts="0" * 64, over='"etag"'
        )
        self._store.committing(claim, commit)
        notes = MultipartJournal(SpoolFolder(self._install.spool, DiskSync(self._install.spool)))
        notes.add(made.job_id, claim.attempt_id, "s3://archive/in.bin.age", "upload-1")

    def _ended(self) -> None:
        for name, code in (("dead", "attempts_exhausted"), ("failed", "decrypt_failed")):
            claim = self._claimed(self._accepted(name, "decrypt", f"{PLACE}/e.age", f"{PLACE}/{name}"))
            self._store.finish(claim, "failed", code)
        made = self._accepted("cancelled", "decrypt", f"{PLACE}/e.age", f"{PLACE}/f")
        self._store.cancel(made.job_id, "acme")

    # -- around them -----------------------------------------------------------------------------------

    def _outbox(self) -> None:
        """The end of one job waits to be told, and that of another was given up."""
        endpoint = WebhookEndpoint(
            "http://127.0.0.1:9/", Path("/nonexistent"), frozenset({"succeeded", "failed"})
        )
        claim = self._claimed(
            self._accepted("told", "decrypt", f"{PLACE}/g.age", f"{PLACE}/g", callback="ci")
        )
        self._store.finish(claim, "failed", "decrypt_failed")
        outbox = Outbox(self._store, {"ci": endpoint})
        given_up = next(one for one in outbox.due("ci", 10) if one.job_id == self.ids["told"])
        outbox.put_off(msgspec.structs.replace(given_up, attempts=19))

    def _broker(self) -> None:
        """A ``kms.submit`` message as a bare Celery client leaves it, sealed by pyrage."""
        intake = (manifest.V1 / "keys/intake.txt").read_text().splitlines()[-1]
        recipient = str(parse_identity(intake).recipient)
        content = {
            "version": 1,
            "token": None,
            "job_id": INTAKE_ID,
            "expires_at": "2026-01-01T00:00:00Z",
            "job": expected_jobs.INTAKE_JOB,
        }
        app = Celery("workflow", broker=self._install.settings.kms.redis.broker_url, set_as_current=False)
        app.conf.broker_transport_options = OPTIONS
        with app.connection_for_write() as connection:
            app.send_task(
                "kms.submit", (seal(recipient, content),), queue="kms.submit", connection=connection
            )

"""Jobs of every kind that REST takes: one API takes each, and another one judges what came of it."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import OK
from pathlib import Path
from typing import Final

from kms_protocol.wire import ENDED
from support.celery_messages import body, in_s, intake_recipient, seal, send
from support.service import CONTEXT, Service, b64, unb64
from support.waiting import until

NEW_CONTEXT: Final = "env=new"
ENDPOINT: Final = "ci"
PARTS_ITEMS: Final = 1_100
"""Items of a job in three parts."""
_BATCH: Final = 1_000
_LARGE: Final = 200_000
"""Bytes that rest in a file of the spool; fewer are in Redis."""
_EACH: Final = ("encrypt", "decrypt", "rewrap", "reseal")
_MOVING: Final = ("rewrap", "reseal")
"""What gives a file a new context, and may do so where it is."""
Check = Callable[[Service, str], None]


@dataclass(frozen=True)
class SubmittedJob:
    """A job that an API took. ``targets`` are the files it makes. ``calls_back``: its end is a webhook."""

    name: str
    job_id: str
    judge: Check
    targets: Sequence[Path] = ()
    calls_back: bool = False

    def check(self, reader: Service) -> None:
        """Wait for its end, and judge what came of it as this API reads it. Raises AssertionError."""
        until(lambda: self._is_settled(reader), f"the end of job {self.name} {self.job_id}")
        shown = reader.job(self.job_id)
        assert shown["state"] == "succeeded", (self.name, shown)
        try:
            self.judge(reader, self.job_id)
        except (AssertionError, KeyError, OSError) as exc:
            raise AssertionError(f"{self.name} {shown}: {type(exc).__name__} {exc}") from exc

    def _is_settled(self, reader: Service) -> bool:
        """Whether it has ended, or waits for a newer worker; it is unknown until its message was taken."""
        answer = reader.get(f"/jobs/{self.job_id}")
        shown = answer.json()
        return answer.status_code == OK and (shown["state"] in ENDED or "waits_for" in shown)


@dataclass
class JobKinds:
    """Jobs that ``api`` takes; what they are to open or to move was sealed by ``sealer``."""

    api: Service
    sealer: Service
    jobs: list[SubmittedJob] = field(default_factory=list)

    def every(self) -> None:
        """Submit jobs of each kind."""
        self._items(1)
        self._items(3)
        self.in_parts()
        self._stream()
        self._group()
        for size in (10, _LARGE):
            self._upload("encrypt", size)
            self._upload("decrypt", size)
        for kind in _EACH:
            self._file(kind)
            self._tree(kind)
        for kind in _MOVING:
            self._file(kind, in_place=True)
            self._tree(kind, in_place=True)

    def held(self, folder: Path) -> None:
        """Submit those over files whose steps ``held_worker.py`` names; the files are beneath ``folder``."""
        self._file("encrypt", folder / "recorded")
        self._file("rewrap", folder / "placed")
        self._tree("encrypt", folder / "many", 40)

    def message(self) -> None:
        """Send a job by the broker, for the intake key that the API names."""
        plains = _plains(3)
        job = {"kind": "encrypt", "context": CONTEXT, "items": _encrypting(plains)}
        asked = body(job, expires_at=in_s(600))
        send(self.api, seal(intake_recipient(self.api), asked))
        self._note("message", str(asked["job_id"]), _seals_items(plains))

    # -- items and uploads ---------------------------------------------------------------------------

    def _items(self, count: int) -> None:
        plains = _plains(count)
        sealed = [{"ciphertext": b64(self.sealer.encrypt(plain))} for plain in plains]
        job = {"items": sealed, "context": CONTEXT}
        self._submit("items", {"kind": "encrypt", "items": _encrypting(plains)}, _seals_items(plains, None))
        self._submit("items", job | {"kind": "decrypt"}, _opened_items(plains))
        for kind in ("rewrap", "reseal"):
            moved = job | {"kind": kind, "new_context": NEW_CONTEXT}
            self._submit("items", moved, _seals_items(plains, NEW_CONTEXT))

    def in_parts(self) -> None:
        """Submit a job over items in three parts; ``held_worker.py`` holds the last one."""
        plains = _plains(PARTS_ITEMS)
        job = {"kind": "encrypt", "context": CONTEXT, "items": _encrypting(plains), "priority": "high"}
        self._submit("parts", job, _seals_items(plains))

    def _stream(self) -> None:
        plains = _plains(600)
        lines = b"".join(json.dumps(item).encode() + b"\n" for item in _encrypting(plains))
        headers = {"Content-Type": "application/x-ndjson", "X-KMS-Context": CONTEXT}
        answer = self.api.post("/jobs?kind=encrypt", content=lines, headers=headers)
        assert answer.status_code == 202, answer.text
        self._note("stream", answer.json()["job_id"], _seals_items(plains))

    def _group(self) -> None:
        """Two jobs, of which each API takes one; they have labels, deadlines and a callback."""
        name, plains = uuid.uuid4().hex, _plains(2)
        more = {"labels": {"team": "pay"}, "metadata": {"run": name}, "callback": ENDPOINT, "keep_for": 3600}
        more |= {"group": {"name": name, "jobs": 2, "callback": ENDPOINT}}
        more |= {"start_by": in_s(600), "run_by": in_s(900), "priority": "low"}
        job = {"kind": "encrypt", "context": CONTEXT, "items": _encrypting(plains), **more}

        def judge(reader: Service, job_id: str) -> None:
            _seals_items(plains)(reader, job_id)
            shown = reader.job(job_id)
            assert (shown["labels"], shown["metadata"]) == ({"team": "pay"}, {"run": name})
            group = reader.get(f"/job-groups/{name}?wait=30").json()
            assert (group["ended"], group["states"]) == (True, {"succeeded": 2})

        for api in (self.api, self.sealer):
            self._note("group", api.submit(job), judge, calls_back=True)

    def _upload(self, kind: str, size: int) -> None:
        plain = _plain(size)
        content = plain if kind == "encrypt" else self.sealer.encrypt(plain)

        def judge(reader: Service, job_id: str) -> None:
            found = reader.result(job_id)
            _same(reader.decrypt(found) if kind == "encrypt" else found, plain)

        self._note(f"upload {kind}", self.api.upload(kind, content, CONTEXT), judge)

    # -- files ---------------------------------------------------------------------------------------

    def _file(self, kind: str, source: Path | None = None, *, in_place: bool = False) -> None:
        source = source or self.api.files / uuid.uuid4().hex
        source.parent.mkdir(exist_ok=True)
        target = source if in_place else source.with_name(f"{source.name}.out")
        plain = _plain(1_000)
        source.write_bytes(self._source(kind, plain))
        job = _job(kind, source.as_uri(), None if in_place else target.as_uri())
        self._submit(f"file {kind}", job, lambda reader, _: _made(reader, kind, target, plain), target)

    def _tree(self, kind: str, source: Path | None = None, files: int = 4, *, in_place: bool = False) -> None:
        source = source or self.api.files / uuid.uuid4().hex
        source.mkdir(parents=True)
        into = source if in_place else source.with_name(f"{source.name}.out")
        plains = {f"{number:03}": _plain(10 + number) for number in range(files)}
        for name, plain in plains.items():
            (source / (f"{name}.age" if kind == "decrypt" else name)).write_bytes(self._source(kind, plain))
        made = {into / (f"{name}.age" if kind == "encrypt" else name): plains[name] for name in plains}

        def judge(reader: Service, job_id: str) -> None:
            assert [line["index"] for line in reader.lines(job_id)] == list(range(files))
            for target, plain in made.items():
                _made(reader, kind, target, plain)

        job = _job(kind, f"{source.as_uri()}/*", None if in_place else f"{into.as_uri()}/")
        self._submit(f"tree {kind}", job, judge, *made)

    def _source(self, kind: str, plain: bytes) -> bytes:
        return plain if kind == "encrypt" else self.sealer.encrypt(plain)

    # -- all -----------------------------------------------------------------------------------------

    def _submit(self, name: str, job: Mapping[str, object], judge: Check, *targets: Path) -> None:
        self._note(name, self.api.submit(job), judge, targets)

    def _note(
        self, name: str, job_id: str, judge: Check, targets: Sequence[Path] = (), *, calls_back: bool = False
    ) -> None:
        self.jobs.append(SubmittedJob(name, job_id, judge, targets, calls_back))


def _job(kind: str, source: str, target: str | None) -> dict[str, object]:
    """A job over files; without a target each file is replaced."""
    moved = {"new_context": NEW_CONTEXT} if kind in _MOVING else {}
    placed: dict[str, object] = {"target": target} if target else {"overwrite": True}
    return {"kind": kind, "source": source, "context": CONTEXT, **placed, **moved}


def _plain(size: int) -> bytes:
    """So many bytes that no other job has, but for the smallest."""
    return (uuid.uuid4().hex.encode() * (size // 32 + 1))[:size]


def _plains(count: int) -> list[bytes]:
    return [_plain(40) for _ in range(count)]


def _encrypting(plains: Sequence[bytes]) -> list[dict[str, str]]:
    return [{"plaintext": b64(plain)} for plain in plains]


# -- what must have come of them -------------------------------------------------------------------------


def _same(found: bytes, plain: bytes) -> None:
    assert found == plain, f"{len(found)} bytes that are not the {len(plain)} expected"


def _made(reader: Service, kind: str, target: Path, plain: bytes) -> None:
    found, context = target.read_bytes(), CONTEXT if kind == "encrypt" else NEW_CONTEXT
    _same(found if kind == "decrypt" else reader.decrypt(found, context), plain)


def _seals_items(plains: Sequence[bytes], context: str | None = CONTEXT) -> Check:
    def judge(reader: Service, job_id: str) -> None:
        lines = reader.lines(job_id)
        assert [line["index"] for line in lines] == list(range(len(plains)))
        items = [{"ciphertext": line["ciphertext"], "context": context} for line in lines]
        opened: list[bytes] = []
        for first in range(0, len(items), _BATCH):
            asked = {"operation": "decrypt", "items": items[first : first + _BATCH]}
            answer = reader.post("/batch", asked).json()
            assert answer["failed"] == 0, answer["results"][:3]
            opened += [unb64(result["plaintext"]) for result in answer["results"]]
        assert opened == list(plains)

    return judge


def _opened_items(plains: Sequence[bytes]) -> Check:
    def judge(reader: Service, job_id: str) -> None:
        assert [unb64(line["plaintext"]) for line in reader.lines(job_id)] == list(plains)

    return judge

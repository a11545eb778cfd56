"""The jobs of a storm: how each is asked for, and what must have come of it. Faults are told elsewhere."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import httpx2 as httpx

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_protocol.context import Context
from kms_protocol.wire import PREFIX
from support.object_stores import ObjectPath, TestBucket
from support.service import CANARY, Json, Service, b64, unb64

WHO: Final = Principal("local")
CONTEXT: Final = {"who": CANARY}
NEW_CONTEXT: Final = {"now": CANARY}
REMOTE: Final = "remote"  # the id of a key that a server holds
_MIB: Final = 1024 * 1024
_MANY_FILES: Final = 600
Manner = Literal["once", "twice", "cancel", "message"]
Send = Callable[[str], httpx.Response]
Check = Callable[[bytes], None]
Target = Path | ObjectPath


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job. ``send`` asks for it once, under an Idempotency-Key; ``check`` judges its result or target.

    ``twice`` asks at the same time from two threads, ``cancel`` changes its mind, ``message`` goes by the
    broker. ``replaces``: something is at the target
    before. ``failing_items`` items are known to fail. ``body`` is what a message seals.
    """

    name: str
    send: Send
    check: Check
    manner: Manner = "once"
    target: Target | None = None
    replaces: bool = False
    failing_items: int = 0
    body: Json | None = None


class JobMix:
    """Makes requests, each with bytes of its own that hold the canary."""

    def __init__(self, service: Service, core: Core, seed: int, *, scale: float) -> None:
        """``scale`` is the size of the larger jobs, of those of a long storm."""
        self._service = service
        self._core = core
        self._rng = random.Random(seed)  # noqa: S311 -- repeatable, no secret
        self._scale = scale
        self._count = 0

    def next(self) -> JobRequest:
        """The next request: kinds in turn, so that a storm has all of them; sizes and manners by chance."""
        self._count += 1
        return self._kinds[self._count % len(self._kinds)]()

    @property
    def _kinds(self) -> Sequence[Callable[[], JobRequest]]:
        return (
            self._bulk,
            self._upload,
            self._file,
            self._back,
            self._refusing,
            self._opened_upload,
            self._opened_file,
            self._rewrapped_file,
            self._stream,
            self._overwritten,
            self._long_file,
            self._tree,
            self._message,
        )

    # -- kinds ---------------------------------------------------------------------------------------

    def _bulk(self) -> JobRequest:
        plain = self._plains(self._rng.choice((1, 7, 60, 700, 1200)))
        body = self._encrypting({"items": [{"plaintext": b64(text)} for text in plain], "context": CONTEXT})
        many = len(plain) > 1000
        manner: Manner = "cancel" if many and self._rng.random() < 0.7 else self._once_or_twice()
        return JobRequest("bulk", self._json(body), lambda result: self._sealed_lines(result, plain), manner)

    def _back(self) -> JobRequest:
        plain = self._plains(self._rng.choice((1, 20, 90)))
        items = [{"ciphertext": b64(self._sealed(text)), "context": CONTEXT} for text in plain]
        send = self._json({"kind": "decrypt", "items": items})
        return JobRequest(
            "bulk back", send, lambda result: _plain_lines(result, plain), self._once_or_twice()
        )

    def _refusing(self) -> JobRequest:
        """An item in the middle is no ciphertext: the job fails, and the others are there."""
        plain = self._plains(5)
        items = [{"ciphertext": b64(self._sealed(text)), "context": CONTEXT} for text in plain]
        items[2]["ciphertext"] = b64(b"no ciphertext")
        expected: list[bytes | None] = [*plain[:2], None, *plain[3:]]
        send = self._json({"kind": "decrypt", "items": items})
        return JobRequest(
            "bulk refused", send, lambda result: _plain_lines(result, expected), failing_items=1
        )

    def _stream(self) -> JobRequest:
        """NDJSON of several parts."""
        plain = self._plains(int(2600 * self._scale))
        lines = b"".join(json.dumps({"plaintext": b64(text)}).encode() + b"\n" for text in plain)

        def send(key: str) -> httpx.Response:
            headers = self._headers(key) | {"Content-Type": "application/x-ndjson"}
            return self._service.post("/jobs?kind=encrypt", content=lines, headers=headers)

        return JobRequest("stream", send, lambda result: self._sealed_lines(result, plain))

    def _upload(self) -> JobRequest:
        plain = self._plain(self._rng.choice((0, 10_000, _MIB, int(4 * _MIB * self._scale))))
        send = self._file_upload("encrypt", plain, self._key())
        return JobRequest("upload", send, lambda result: self._seals(result, plain), self._once_or_twice())

    def _opened_upload(self) -> JobRequest:
        plain = self._plain(self._rng.choice((1, 70_000, _MIB)))
        send = self._file_upload("decrypt", self._sealed(plain))
        return JobRequest("upload back", send, lambda result: _same(result, plain))

    def _file(self) -> JobRequest:
        plain = self._plain(self._rng.choice((0, 1_000, 300_000)))
        more = self._encrypting({})
        del more["kind"]
        return self._reference("file", "encrypt", plain, lambda found: self._seals(found, plain), **more)

    def _opened_file(self) -> JobRequest:
        plain = self._plain(self._rng.choice((1, 100_000, 2 * _MIB)))
        return self._reference("file back", "decrypt", self._sealed(plain), lambda found: _same(found, plain))

    def _rewrapped_file(self) -> JobRequest:
        plain = self._plain(self._rng.choice((1, 100_000, 2 * _MIB)))

        def check(found: bytes) -> None:
            self._seals(found, plain, NEW_CONTEXT)

        return self._reference("file rewrap", "rewrap", self._sealed(plain), check, new_context=NEW_CONTEXT)

    def _overwritten(self) -> JobRequest:
        """Something is there, and may be replaced: its readers see the old or the new, whole."""
        plain = self._plain(50_000)
        request = self._reference(
            "file over", "encrypt", plain, lambda found: self._seals(found, plain), overwrite=True
        )
        assert request.target
        request.target.write_bytes(b"old")
        return replace(request, replaces=True)

    def _long_file(self) -> JobRequest:
        """Its content is made again for the check: all of them would fill the memory."""
        number, size = self._count, int(40 * _MIB * self._scale)
        manner: Manner = "cancel" if self._rng.random() < 0.6 else "once"
        return self._reference(
            "long file",
            "encrypt",
            _text(number, size),
            lambda found: self._seals(found, _text(number, size)),
            manner=manner,
        )

    def _tree(self) -> JobRequest:
        """A folder of so many files that a process holds the job for a second or more."""
        source, target = self._service.files / f"{self._count}.in", self._service.files / f"{self._count}.out"
        source.mkdir()
        plain = [self._plain(1 + number) for number in range(_MANY_FILES)]
        for number, content in enumerate(plain):
            (source / f"{number:03}").write_bytes(content)

        def check(result: bytes) -> None:
            for number, (line, content) in enumerate(zip(_lines(result, len(plain)), plain, strict=True)):
                assert "error" not in line, line
                self._seals((target / f"{number:03}.age").read_bytes(), content)

        job = {"kind": "encrypt", "source": f"{source.as_uri()}/*", "target": f"{target.as_uri()}/"}
        return JobRequest("tree", self._json({**job, "context": CONTEXT}), check)

    def _message(self) -> JobRequest:
        plain = self._plains(self._rng.choice((1, 30)))
        body = {"kind": "encrypt", "items": [{"plaintext": b64(text)} for text in plain], "context": CONTEXT}
        check: Check = lambda result: self._sealed_lines(result, plain)  # noqa: E731 -- as the others
        return JobRequest("message", self._json(body), check, "message", body=body)

    # -- what they are made of -----------------------------------------------------------------------

    def _plain(self, size: int) -> bytes:
        return _text(self._count, size)

    def _plains(self, count: int) -> list[bytes]:
        return [f"{CANARY} {self._count}/{index}".encode() for index in range(count)]

    def _sealed(self, plain: bytes) -> bytes:
        return self._core.kms.encrypt(WHO, plain, Context.parse(CONTEXT)).ciphertext

    def _once_or_twice(self) -> Manner:
        return "twice" if self._rng.random() < 0.25 else "once"

    @staticmethod
    def _headers(key: str) -> dict[str, str]:
        return {"Idempotency-Key": key, "X-KMS-Context": f"who={CANARY}"}

    def _json(self, body: Mapping[str, object]) -> Send:
        return lambda key: self._service.post("/jobs", body, headers={"Idempotency-Key": key})

    def _file_upload(self, kind: str, content: bytes, key_id: str | None = None) -> Send:
        more = {"X-KMS-Key-Id": key_id} if key_id else {}
        return lambda key: self._service.http.post(
            f"{PREFIX}/files/{kind}", content=content, headers=self._headers(key) | more
        )

    def _key(self) -> str | None:
        """Now and then the remote one."""
        return REMOTE if self._rng.random() < 0.3 else None

    def _encrypting(self, body: Json) -> Json:
        key_id = self._key()
        return {"kind": "encrypt", **body, **({"key_id": key_id} if key_id else {})}

    def _place(self, end: Literal["in", "out"]) -> Target:
        return self._service.files / f"{self._count}.{end}"

    def _reference(
        self, name: str, kind: str, content: bytes, check: Check, *, manner: Manner = "once", **more: object
    ) -> JobRequest:
        source, target = self._place("in"), self._place("out")
        source.write_bytes(content)
        job = {"kind": kind, "source": source.as_uri(), "target": target.as_uri(), "context": CONTEXT}
        return JobRequest(name, self._json(job | more), check, manner, target)

    # -- what must have come of them -----------------------------------------------------------------

    def _seals(self, found: bytes, plain: bytes, context: dict[str, str] = CONTEXT) -> None:
        opened = self._core.kms.decrypt(WHO, found, Context.parse(context))
        assert opened.origin == "service"
        _same(opened.plaintext, plain)

    def _sealed_lines(self, result: bytes, plain: list[bytes]) -> None:
        for line, text in zip(_lines(result, len(plain)), plain, strict=True):
            self._seals(unb64(line["ciphertext"]), text)


class ObjectJobMix(JobMix):
    """The same with objects in place of files, whole prefixes of them too; a server holds no key."""

    def __init__(self, service: Service, core: Core, seed: int, *, scale: float, bucket: TestBucket) -> None:
        super().__init__(service, core, seed, scale=scale)
        self._bucket = bucket

    def _key(self) -> None:
        return None

    def _place(self, end: Literal["in", "out"]) -> Target:
        return ObjectPath(self._bucket, f"{end}/{self._count}")

    def large(self, size: int) -> JobRequest:
        """A job over an object that takes a worker some seconds."""
        self._count += 1
        plain = self._plain(size)
        return self._reference("large", "encrypt", plain, lambda found: self._seals(found, plain))

    def _tree(self) -> JobRequest:
        """A job over all objects with a name like this."""
        plain = {
            f"{number}.txt": self._plain(1 + 3000 * number) for number in range(self._rng.choice((1, 6, 25)))
        }
        folder, into = (f"{end}/{self._count}/" for end in ("in", "out"))
        for name, content in plain.items():
            self._bucket.put(folder + name, content)

        def check(result: bytes) -> None:
            assert len(_lines(result, len(plain))) == len(plain)
            for name, content in plain.items():
                self._seals(self._bucket.get(f"{into}{name}.age"), content)

        body = {"source": self._bucket.url(f"{folder}*.txt"), "target": self._bucket.url(into)}
        return JobRequest("prefix", self._json({"kind": "encrypt", "context": CONTEXT, **body}), check)


def _text(number: int, size: int) -> bytes:
    seed = f"{CANARY} {number} ".encode()
    return (seed * (size // len(seed) + 1))[:size]


def _plain_lines(result: bytes, plain: Sequence[bytes | None]) -> None:
    for line, text in zip(_lines(result, len(plain)), plain, strict=True):
        if text is None:
            assert line["error"] == {"code": "not_a_ciphertext"}
        else:
            _same(unb64(line["plaintext"]), text)


def _lines(result: bytes, count: int) -> list[Json]:
    lines: list[Json] = [json.loads(line) for line in result.splitlines()]
    assert [line["index"] for line in lines] == list(range(count))
    return lines


def _same(found: bytes, plain: bytes) -> None:
    assert found == plain, f"{len(found)} bytes that are not the {len(plain)} expected"

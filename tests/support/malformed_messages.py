"""Broker messages that are none, as somebody with the broker's URL can send them: one of each kind."""

import json
import uuid
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

WRONG_TYPES: Final[tuple[object, ...]] = (None, 1, [], "x")  # than what is expected
QUEUES: Final = ("kms.bulk", "kms.files", "kms.maintenance", "kms.submit")


class RawMessage(NamedTuple):
    """What is given to kombu, which packs it for any broker."""

    body: bytes
    headers: Any
    content_type: str = "application/json"
    content_encoding: str = "utf-8"


def headers(task: object = "kms.run", **more: object) -> dict[str, object]:
    return {"task": task, "id": str(uuid.uuid4()), **more}


def kinds(queue: str) -> Iterator[RawMessage]:
    """Messages of which none is one of ``queue``."""
    task = "kms.submit" if queue == "kms.submit" else "kms.run"
    good = json.dumps([["x" if queue == "kms.submit" else str(uuid.uuid4())], {}, None]).encode()
    bodies = [b"[]", b'{"a":1}', b"text", b"\xff\xfe", b"", b"null", b"[" * 50_000]
    bodies += [b'[["a","b"],{},{}]', b'[[{"a":1}],{},{}]', b'[["x"],{"job_id":"x"},{}]', b'["x",{},{}]']
    bodies += [b"[[1],{},{}]", b'{"task":"kms.run","id":"1","args":[],"kwargs":{}}', b'[[["x"]],{},{}]']
    bodies += [b"9" * 100_000, b'{"args":["x"],"kwargs":{}}']
    for body in bodies:
        yield RawMessage(body, headers(task))
    builtin = ("celery.map", "celery.chord_unlock", "celery.backend_cleanup")
    for name in (*builtin, "kms.nothing", "", *WRONG_TYPES):
        yield RawMessage(good, headers(name))
    empty: dict[str, object] = {}
    for made in (
        empty,
        {"task": task},
        headers(task, id=None),
        headers(task, id={}),
        headers(task, id="a b"),
    ):
        yield RawMessage(good, made)
    yield RawMessage(good, headers(task, id="i" * 300))
    for kind in (
        "application/x-python-serialize",
        "application/x-yaml",
        "text/plain",
        "application/data",
        "x",
    ):
        yield RawMessage(good, headers(task), kind)
    for encoding in ("utf-16", "binary", "none"):
        yield RawMessage(good, headers(task), content_encoding=encoding)
    for compression in ("gzip", "application/x-gzip", "nothing"):
        yield RawMessage(zlib.compress(good), headers(task, compression=compression))
    if queue == "kms.submit":
        yield RawMessage(b"[[],{},null]", headers(task))
    else:
        yield RawMessage(b'[["not-a-job"],{},{}]', headers(task))
        yield RawMessage(b'[["' + b"a" * 100_000 + b'"],{},{}]', headers(task))
        far = {"eta": "2999-01-01T00:00:00+00:00", "timelimit": [1, 1], "retries": "x"}
        yield RawMessage(b"[]", headers(task, **far))


def bomb() -> bytes:
    """382 KiB that a worker would make 394 MB of."""
    packer = zlib.compressobj()
    spaces = b" " * 1_000_000
    return packer.compress(b"[") + b"".join(packer.compress(spaces) for _ in range(394)) + packer.flush()

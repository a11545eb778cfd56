"""Jobs of the golden set: what opens their records, and an install as it was when they were taken down.

The reading part imports nothing of the service.
"""

import base64
import fcntl
import json
import lzma
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis

from support.golden import golden_set, reference

SECRET: Final = reference.origin_key(golden_set.identity_secret("spool"))
"""The key that seals records: derived from the spool identity."""
PATH: Final = golden_set.V1.parent / "v3/jobs.json.xz"
UNFINISHED: Final = ("three/plain.age",)
Json = dict[str, Any]


def taken_down() -> Json:
    """Read ``jobs`` by name, the keys of ``redis``, the files of ``spool`` and of the root."""
    found: Json = json.loads(lzma.decompress(PATH.read_bytes()))
    return found


def folder(found: Json) -> Path:
    """The folder of the install: its path is in sealed records."""
    return Path(found["folder"])


@contextmanager
def own_folder(path: Path) -> Iterator[Path]:
    """Make this folder. One run of the tests at a time has it."""
    with Path(tempfile.gettempdir(), f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path)


def put_files(folder: Path, files: Sequence[Mapping[str, Any]]) -> None:
    """Lay out files, but what an attempt had ready or put in place: that is known by its inode."""
    for one in files:
        path = folder / one["path"]
        if one.get("is_folder"):
            path.mkdir(parents=True, exist_ok=True)
        elif one["path"] not in UNFINISHED and path.suffix != ".tmp":
            path.write_bytes(base64.b64decode(one["content"]))
            path.chmod(int(one["mode"], 8))


def put_keys(client: redis.Redis, keys: Mapping[str, Mapping[str, Any]]) -> None:
    """Write keys of Redis, each with its time to expire."""
    for text, held in keys.items():
        _put_key(client, _raw(text), held["type"], held["value"])
        if at := held.get("expires"):
            client.expireat(_raw(text), at)


def _put_key(client: redis.Redis, key: bytes, kind: str, value: Any) -> None:  # noqa: ANN401 -- by its kind
    match kind:
        case "string":
            client.set(key, _raw(value))
        case "hash":
            client.hset(key, mapping={_raw(name): _raw(each) for name, each in value.items()})
        case "set":
            client.sadd(key, *map(_raw, value))
        case "zset":
            client.zadd(key, {_raw(member): score for member, score in value})
        case "stream":
            for name, fields in value:
                client.xadd(key, {_raw(at): _raw(each) for at, each in fields.items()}, id=name)


def _raw(text: str) -> bytes:
    """Bytes as they were taken down: as text, or in base64."""
    head, _, rest = text.partition("base64:")
    return text.encode() if head else base64.b64decode(rest)

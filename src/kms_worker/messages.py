"""Checks of broker messages before Celery acts on them: Malformed is raised for any other message.

A producer chooses task, arguments and options. Of a message only a task name, a task id, one argument and
bounded links are kept. All other options of Celery (eta, expires, timelimit, chain, chord, group, retries,
shadow, reply_to and the like) are dropped and have no effect.
"""

import re
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from kms_core.age.header import VERSION_LINE
from kms_core.jobs.spec import BULK, FILES, MAINTENANCE
from kms_core.jobs.store.wake_up import TASK as RUN
from kms_worker.refusals import TASK_ID
from kms_worker.rotation import TASK as KEYS
from kms_worker.submit import QUEUE as SUBMIT_QUEUE
from kms_worker.submit import TASK as SUBMIT

Reason = Literal[
    "too_large",  # above the bound of its queue; not parsed
    "headers",  # no table, or an id that is none
    "compressed",  # never decompressed
    "content_type",  # not JSON in UTF-8
    "unknown_task",  # no task of that queue
    "body",  # not JSON, or not the arguments of the task
    "invalid_request",  # on kms.submit: an argument that is not base64
    "not_a_ciphertext",  # on kms.submit: an argument that is no age file
    "worker_died",  # came back twice from a worker that died or lost its connection
    "crashed",  # it passed the checks, and handling it failed all the same
]
TASKS: Final[Mapping[str, frozenset[str]]] = {
    BULK: frozenset({RUN}),
    FILES: frozenset({RUN}),
    MAINTENANCE: frozenset({RUN, KEYS}),
    SUBMIT_QUEUE: frozenset({SUBMIT}),
}
"""Queues that are consumed, and the tasks that may come by each."""
MOST_BYTES: Final = 65_536  # of a message without an argument; Celery writes about 1 KiB
MOST_RESENDS: Final = 2  # of a message whose worker died, each time as a copy with their number
_MOST_EMBED: Final = 262_144  # bytes of Celery's options, of which links are read
_MOST_LINKS: Final = 8
_MOST_LINK_BYTES: Final = 8192
_MOST_DEPTH: Final = 16
_NAME: Final = re.compile(r"[\w.:@-]{1,200}", re.ASCII)
_OURS: Final = ("kms.", "celery.")


class Malformed(Exception):
    """Raised for a message that this service did not send. Carries the reason and no text of the message."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class CeleryMessage(msgspec.Struct):
    """A message after its check: Celery's names, and no other field that Celery would obey."""

    task: str
    task_id: str
    args: list[str]
    callbacks: list[dict[str, object]]
    errbacks: list[dict[str, object]]
    resends: int

    def headers(self) -> dict[str, object]:
        """Celery's headers. Without ``argsrepr`` Celery would log the argument."""
        named = {"task": self.task, "id": self.task_id, "resends": self.resends}
        return {"lang": "py", **named, "argsrepr": "-", "kwargsrepr": "-"}

    def body(self) -> bytes:
        """Celery's body, as JSON."""
        links = {"callbacks": self.callbacks or None, "errbacks": self.errbacks or None}
        return msgspec.json.encode([self.args, {}, {**links, "chain": None, "chord": None}])


def most_bytes(queue: str, submit_bytes: int) -> int:
    """The most bytes of a message's body in ``queue``; ``submit_bytes`` bounds the argument of kms.submit."""
    return MOST_BYTES + (submit_bytes if queue == SUBMIT_QUEUE else 0)


def read(
    queue: str, headers: object, content: tuple[object, object], body: object, *, redelivered: bool
) -> CeleryMessage:
    """The message in ``body``, at most ``most_bytes`` long. ``content`` is its type and encoding.

    Raises Malformed.
    """
    if not isinstance(headers, Mapping):
        raise Malformed("headers")
    if headers.get("compression"):
        raise Malformed("compressed")
    task, task_id = headers.get("task"), headers.get("id")
    if not isinstance(task, str) or task not in TASKS.get(queue, ()):
        raise Malformed("unknown_task")
    if not isinstance(task_id, str) or not TASK_ID.fullmatch(task_id):
        raise Malformed("headers")
    if not _is_json(content):
        raise Malformed("content_type")
    args, embed = _arguments(task, body)
    callbacks, errbacks = (_links(embed, name) for name in ("callbacks", "errbacks"))
    resends = headers.get("resends")
    count = resends if isinstance(resends, int) and 0 < resends < MOST_RESENDS else 0
    return CeleryMessage(task, task_id, args, callbacks, errbacks, count + redelivered)


def check_sealed(message: CeleryMessage) -> None:
    """Refuse a kms.submit that cannot be an age file, unless the pool is to send its ``link_error``.

    Raises Malformed.
    """
    if message.errbacks:
        return
    try:
        content = msgspec.convert(message.args[0], bytes)
    except msgspec.ValidationError:
        raise Malformed("invalid_request") from None
    if not content.startswith(VERSION_LINE):
        raise Malformed("not_a_ciphertext")


def _is_json(content: tuple[object, object]) -> bool:
    kind, encoding = content
    return kind == "application/json" and isinstance(encoding, str) and encoding.lower() == "utf-8"


class _Empty(msgspec.Struct, forbid_unknown_fields=True):
    pass


_parts: Final = msgspec.json.Decoder(tuple[msgspec.Raw, msgspec.Raw, msgspec.Raw])


def _arguments(task: str, body: object) -> tuple[list[str], object]:
    """The positional arguments, checked, and Celery's options, which are not. No other value is built."""
    if not isinstance(body, (bytes, bytearray, memoryview, str)):
        raise Malformed("body")
    try:
        raw, named, embed = _parts.decode(body)
        if len(embed) > _MOST_EMBED:
            raise Malformed("too_large")
        msgspec.json.decode(named, type=_Empty)
        args = list(msgspec.json.decode(raw, type=tuple[str] if task == SUBMIT else tuple[()]))
        options = msgspec.json.decode(embed)
    except (ValueError, RecursionError):  # of msgspec, and UnicodeDecodeError
        raise Malformed("body") from None
    return args, options


# -- links of kms.submit: Celery sends them, so they are rebuilt from fields known to be harmless ---------


def _links(embed: object, name: str) -> list[dict[str, object]]:
    """The links that docs/celery.md allows; others are left out.

    Of eight, those to a task and queue that are not the service's, with at most 8 KiB of arguments.
    """
    found = embed.get(name) if isinstance(embed, dict) else None
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        return []
    return [made for raw in found[:_MOST_LINKS] if (made := _link(raw)) is not None]


def _link(raw: object) -> dict[str, object] | None:
    if not isinstance(raw, dict):
        return None
    options = raw.get("options")
    queue = options.get("queue") if isinstance(options, dict) else None
    args, named = raw.get("args") or [], raw.get("kwargs") or {}
    known = _is_theirs(raw.get("task")) and _is_theirs(queue)
    if not known or not isinstance(args, list) or not isinstance(named, dict):
        return None
    if not _is_flat([args, named]):
        return None
    immutable = raw.get("immutable") is True
    made = {"task": raw["task"], "args": args, "kwargs": named, "options": {"queue": queue}}
    return {**made, "subtask_type": None, "immutable": immutable}


def _is_theirs(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.startswith(_OURS)


def _is_flat(value: object) -> bool:
    """Return whether JSON is neither deep nor long, and has nothing that kombu would turn into an object."""
    return _depth(value, _MOST_DEPTH) and len(msgspec.json.encode(value)) <= _MOST_LINK_BYTES


def _depth(value: object, left: int) -> bool:
    if isinstance(value, dict):
        return left > 0 and "__type__" not in value and all(_depth(one, left - 1) for one in value.values())
    if isinstance(value, list):
        return left > 0 and all(_depth(one, left - 1) for one in value)
    return True

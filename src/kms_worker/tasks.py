"""The tasks of Celery: ``kms.submit`` takes jobs of messages, ``kms.keys`` looks after key versions."""

import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable
from typing import Final

import structlog
from celery import Celery, Task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError

from kms_core import key_rotation
from kms_core.container import Core
from kms_core.jobs.spec import MAINTENANCE
from kms_core.jobs.store import broker, usage
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.celery_intake import Intake
from kms_core.observability import metrics
from kms_core.observability.metrics import added_usage
from kms_core.periodic import PeriodicThread, SharedTime
from kms_core.settings.model import RotationSection, Settings
from kms_protocol.errors import (
    ConfigurationError,
    InvalidRequest,
    JobsUnavailable,
    KmsError,
    Unavailable,
    UnknownKey,
)

TASK_ID: Final = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
LOG_WINDOW_S: Final = 60.0
LOG_LINES: Final = 3
"""Lines of a kind in a window; the next line after says how many were left out."""
SUBMIT_TASK: Final = "kms.submit"
QUEUE: Final = "kms.submit"
_PAUSE_S: Final = 2.0
KEYS_TASK: Final = "kms.keys"
EVERY_S: Final = 60.0
_ATTEMPT_EVERY_S: Final = 3600.0
_log = structlog.get_logger(__name__)


class LogBound:
    """Lets few lines of a kind into the log, whatever the rate of events. One for each process."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, ...], tuple[float, int, int]] = {}
        """By kind: when its window began, the lines since then, the events that got no line."""

    def passes(self, *kind: str) -> int:
        """Count an event; returns the number of events for a log line, 0 for none."""
        now = time.monotonic()
        begin, lines, unsaid = self._windows.get(kind, (-math.inf, 0, 0))
        if now - begin >= LOG_WINDOW_S:
            begin, lines = now, 0
        told = unsaid + 1 if lines < LOG_LINES else 0
        self._windows[kind] = (begin, lines + bool(told), 0 if told else unsaid + 1)
        return told


class Refusals:
    """Refusals that one process has counted."""

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        """``beat`` is called for each message: to refuse one is work."""
        self._beat = beat
        self._bound = LogBound()

    def refuse(self, queue: str, code: str, task_id: object = "", event: str = "message.refused") -> None:
        """Record that a message was dropped for ``code``, a word of a bounded set.

        The sender chose ``task_id``: it is logged if it is a printable text without spaces.
        """
        self._beat()
        metrics.MESSAGES_REFUSED.labels(queue, code).inc()
        if count := self._bound.passes(queue, code):
            named = task_id if isinstance(task_id, str) and TASK_ID.fullmatch(task_id) else ""
            _log.warning(event, queue=queue, code=code, count=count, task_id=named)


def queues(intake: Intake | None) -> tuple[str, ...]:
    """The queues that a worker consumes beside its own."""
    if intake is None:
        _log.info("submit.off", advice="make a key at [kms.jobs] intake_identity_path, see docs/celery.md")
        return ()
    return (QUEUE,)


def register_submit(
    app: Celery,
    build: Callable[[], Intake | None],
    worker: str,
    pulse: SharedTime,
) -> None:
    """Add the task. ``build`` is called once in each process of the pool; ``pulse`` is of all of them."""
    logging.getLogger("celery.app.trace").addFilter(_is_news)
    logging.getLogger("celery.pool").addFilter(_above_debug)
    intake = functools.cache(build)
    refusals = Refusals()

    @app.task(name=SUBMIT_TASK, bind=True, throws=(KmsError,), shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def submit(task: Task, *args: object, **named: object) -> str:
        """The job's id, for ``link``; raises, for ``link_error``, where the message is refused for good."""
        pulse.note()
        if reason := task.request.get("unsupported"):
            refusals.refuse(QUEUE, reason, task.request.id, "submit.refused")
            raise InvalidRequest
        try:
            return accept(intake(), args, named, f"{worker}/{os.getpid()}")
        except (Unavailable, ConfigurationError) as exc:
            _log.warning("submit.postponed", code=exc.code)
            time.sleep(_PAUSE_S)
            _send_again(app, task.request, args)
            raise Ignore from None  # links do not fire
        except KmsError as exc:
            refusals.refuse(QUEUE, exc.code, task.request.id, "submit.refused")
            raise type(exc) from None  # its class alone leaves the process, no text
        except Exception as exc:  # noqa: BLE001 -- the top of the worker: the message must not come back
            # Its class alone: text and traceback may hold the argument.
            _log.error("submit.crashed", error=type(exc).__name__)
            refusals.refuse(QUEUE, "crashed", task.request.id, "submit.refused")
            raise KmsError from None


def _send_again(app: Celery, request: Context, args: tuple[object, ...]) -> None:
    """Put a message back as a new one; its own term bounds how often.

    It does not count as a redelivery, of which a broker allows some twenty (RabbitMQ 4). Raises Reject where
    the broker is away.
    """
    try:
        app.send_task(
            SUBMIT_TASK,
            args,
            queue=QUEUE,
            task_id=request.id,
            link=request.callbacks,
            link_error=request.errbacks,
            argsrepr="-",
            kwargsrepr="-",
            headers={"resends": request.get("resends") or 0},
            retry=False,
            **broker.WITHIN,
        )
    except (OperationalError, OSError, AttributeError) as exc:
        raise Reject(type(exc).__name__, requeue=True) from None


def accept(intake: Intake | None, args: tuple[object, ...], named: dict[str, object], worker: str) -> str:
    """The id of the job in the one argument. Raises as ``Intake.accept``."""
    if intake is None:
        raise UnknownKey
    if len(args) != 1 or named:
        raise InvalidRequest
    job_id = intake.accept(args[0], worker)
    _log.info("submit.accepted", job_id=job_id)
    return job_id


def _is_news(record: logging.LogRecord) -> bool:
    """Celery logs a traceback for each message that goes back to the queue; ``submit.postponed`` says it."""
    return not (record.exc_info and isinstance(record.exc_info[1], Reject))


def _above_debug(record: logging.LogRecord) -> bool:
    """At DEBUG Celery's pool prints the argument of each task."""
    return record.levelno > logging.DEBUG


# Scheduled rotation: a thread of the parent looks at the clock, a child of the pool talks to backends.
#
# The message is lost or late without harm: the next one comes within a minute, and a short lock in Redis
# lets one attempt an hour happen for a key.


def register_keys(app: Celery, core: Callable[[], Core], settings: Settings, name: str) -> None:
    """The task that looks after keys."""

    @app.task(name=KEYS_TASK)  # type: ignore[untyped-decorator]  # Celery ships no types
    def look_after_keys() -> None:
        try:
            # Once in a while, however many messages there are.
            if core().worker_context.store.once("keys-looked", name, EVERY_S / 2):
                look_after(core(), settings.kms.rotation, name)
        except JobsUnavailable:
            _log.warning("rotation.left_to_the_next_time")
        except Exception as exc:  # noqa: BLE001 -- the top of the worker: the next message tries again
            _log.exception("rotation.crashed", error=type(exc).__name__)


def look_after(core: Core, rules: RotationSection, owner: str) -> None:
    """Update the key metrics, and rotate the keys that are due. Raises JobsUnavailable."""
    store = core.worker_context.store
    counts = added_usage(usage.shared_usage(store.redis), core.kms.usage.peek())
    due = key_rotation.find_due(core.kms.keyring, counts, rules)
    mine = [state for state in due if store.once(f"rotate:{state.key_id}", owner, _ATTEMPT_EVERY_S)]
    key_rotation.rotate_due(core.kms, mine)


class Clock(PeriodicThread):
    """Sends the message once a minute, from one worker of all."""

    def __init__(self, app: Celery, store: JobStore, name: str) -> None:
        super().__init__("rotation-clock", EVERY_S / 4, failed="rotation.round_failed")
        self._app = app
        self._store = store
        self._owner = name
        self.wake()  # the first round is at once

    def round(self) -> None:
        if self._store.once("keys", self._owner, EVERY_S):
            self._app.send_task(KEYS_TASK, queue=MAINTENANCE, argsrepr="-", kwargsrepr="-", **broker.WITHIN)

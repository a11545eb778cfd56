"""The task ``kms.submit``, which takes jobs of messages."""

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Final

import structlog
from celery import Celery, Task
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError

from kms_core.jobs.store import broker
from kms_core.jobs.submission.celery_intake import Intake
from kms_core.shared_time import SharedTime
from kms_protocol.errors import ConfigurationError, InvalidRequest, KmsError, Unavailable, UnknownKey
from kms_worker.refusals import Refusals

SUBMIT_TASK: Final = "kms.submit"
QUEUE: Final = "kms.submit"
_PAUSE_S: Final = 2.0
_log = structlog.get_logger(__name__)


def queues(intake: Intake | None) -> tuple[str, ...]:
    """The queues that a worker consumes beside its own."""
    if intake is None:
        _log.info("submit.off", advice="make a key at [kms.jobs] intake_identity_path, see docs/celery.md")
        return ()
    return (QUEUE,)


def register(
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

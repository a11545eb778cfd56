"""The task ``kms.submit``: hands messages to the intake and says which are tried again; knows no message."""

import functools
import logging
import math
import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import Final

import structlog
from celery import Celery
from celery.exceptions import Reject

from kms_core.errors import ConfigurationError, InvalidRequest, KmsError, SpoolFull, Unavailable, UnknownKey
from kms_core.jobs.intake import Intake

TASK: Final = "kms.submit"
QUEUE: Final = "kms.submit"
_PAUSE_S: Final = 2.0
_CLOCK: Final = struct.Struct("d")
_log = structlog.get_logger(__name__)


class Pulse:
    """When a process of this worker last took a message, in memory that its children share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _CLOCK.size)
        _CLOCK.pack_into(self._memory, 0, -math.inf)

    def beat(self) -> None:
        _CLOCK.pack_into(self._memory, 0, time.monotonic())

    def idle_s(self) -> float:
        """Seconds since then; infinite if it never did."""
        (at,) = _CLOCK.unpack_from(self._memory)
        return time.monotonic() - float(at)


def queues(intake: Intake | None) -> tuple[str, ...]:
    """What a worker consumes besides its own queues."""
    if intake is None:
        _log.info("submit.off", advice="make a key at [kms.jobs] intake_identity_path, see docs/celery.md")
        return ()
    return (QUEUE,)


def register(app: Celery, build: Callable[[], Intake | None], worker: str, pulse: Pulse) -> None:
    """Add the task. ``build`` is called once in each process that runs it; ``worker`` names the worker."""
    logging.getLogger("celery.app.trace").addFilter(_is_news)
    logging.getLogger("celery.pool").addFilter(_above_debug)
    intakes = functools.cache(lambda _process: build())

    @app.task(name=TASK, throws=(KmsError,), shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def submit(*args: object, **named: object) -> str:
        """The job's id, for ``link``; raises, for ``link_error``, where the message is refused for good."""
        pulse.beat()
        try:
            return accept(intakes(os.getpid()), args, named, f"{worker}/{os.getpid()}")
        except (Unavailable, SpoolFull, ConfigurationError) as exc:
            # Back to the front of the queue; its term bounds how often. Links do not fire.
            _log.warning("submit.postponed", code=exc.code)
            time.sleep(_PAUSE_S)
            raise Reject(exc.code, requeue=True) from None
        except KmsError as exc:
            _log.warning("submit.refused", code=exc.code)
            raise type(exc) from None  # its class alone leaves the process, no text
        except Exception as exc:  # noqa: BLE001 -- the top of the worker: the message must not come back
            # Its class alone: text and traceback may hold the argument.
            _log.error("submit.crashed", error=type(exc).__name__)
            raise KmsError from None


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

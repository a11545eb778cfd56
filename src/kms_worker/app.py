"""Builds the Celery application of the worker. Its messages say only that a queue has work."""

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from celery import Celery, Task, signals
from kombu.entity import Exchange, Queue

from kms_core.container import Core, build_intake
from kms_core.container import build as build_core
from kms_core.jobs.execution import attendance
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_next
from kms_core.jobs.model import Following
from kms_core.jobs.spec import FILES, QUEUES
from kms_core.jobs.store import broker
from kms_core.jobs.store.usage import UsageFlush
from kms_core.jobs.store.wake_ups import TASK
from kms_core.observability import tracing
from kms_core.redis_client import celery_options
from kms_core.settings.model import Settings
from kms_core.shared_time import SharedTime
from kms_protocol.errors import JobsUnavailable, KmsError
from kms_worker import rotation, submit
from kms_worker.refusals import LogBound

# After so long Redis gives out a kms.submit again whose worker was killed: nothing else brings it back.
_VISIBILITY_S: Final = 600
_SLICE_S: Final = 1.0
_LONG_SLICE_S: Final = 10.0
_TURN_S: Final = 0.5
_log = structlog.get_logger(__name__)
_bound: Final = LogBound()

CONFIGURATION: Final[dict[str, object]] = {
    "accept_content": ["json"],
    "task_ignore_result": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_default_queue": FILES,
    "worker_prefetch_multiplier": 1,
    "worker_enable_remote_control": False,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
    "worker_soft_shutdown_timeout": 20,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,
}
TRANSPORT: Final[dict[str, object]] = {
    "visibility_timeout": _VISIBILITY_S,
    "unacked_restore_interval": 30,
    "unacked_restore_throttle": 1,
    "unacked_restore_limit": 100,  # of one look, or a list of junk would keep the loop for a minute
    "socket_timeout": 10,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "polling_interval": 5,  # seconds that Redis holds a BRPOP: a message ends it at once
    "health_check_interval": 23,  # a line that went dead is noticed after twice this and those 5 s
    "global_keyprefix": "kms:",
    "confirm_publish": True,  # RabbitMQ: a message counts as sent once a majority has it
}


def build(settings: Settings, name: str, pulse: SharedTime) -> Celery:
    """The application of the worker ``name``: a task that runs a job, and one that takes sealed messages.

    Raises ConfigurationError.
    """
    traced = settings.kms.traces
    tracing.check(enabled=traced.enabled)
    app = Celery("kms-worker", set_as_current=False)
    app.conf.update(CONFIGURATION | celery_options(settings.kms.redis, TRANSPORT))
    # A wake-up may be lost, so nothing acknowledges it; a submission is kept until it is a job.
    app.conf.task_queues = [
        _queue(each, app.conf.task_create_missing_queue_type) for each in (*QUEUES, submit.QUEUE)
    ]
    signals.setup_logging.connect(lambda **_: None, weak=False)  # so Celery leaves logging alone
    notify = broker.notify_through(app, settings.kms.redis)

    @functools.cache
    def core() -> Core:
        """Called in processes of the pool only: each has its own connections, and none crosses a fork."""
        tracing.configure("kms-worker", enabled=traced.enabled, endpoint=traced.endpoint)
        made = build_core(settings, "worker", notify)
        usage_flush = UsageFlush(made.kms.usage, made.worker_context.store.redis)
        usage_flush.start()
        made.audit_maintenance.start()
        signals.worker_process_shutdown.connect(lambda **_: usage_flush.stop(), weak=False)
        signals.worker_process_shutdown.connect(lambda **_: made.audit_maintenance.stop(), weak=False)
        signals.worker_process_shutdown.connect(lambda **_: tracing.stop(), weak=False)
        return made

    @app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]  # Celery ships no types
    def run(task: Task) -> None:
        queue = (task.request.delivery_info or {}).get("routing_key") or FILES
        _drain(core, f"{name}/{os.getpid()}", queue, settings.kms.jobs.queues)

    rotation.register(app, core, settings, name)
    submit.register(app, lambda: build_intake(settings, core().submitter), name, pulse)
    return app


def _queue(name: str, kind: str) -> Queue:
    """A queue as a sender's Celery declares it by itself; on RabbitMQ a difference would be refused."""
    arguments = None if kind == "classic" else {"x-queue-type": kind}
    return Queue(name, Exchange(name), name, queue_arguments=arguments, no_ack=name in QUEUES)  # type: ignore[no-untyped-call]  # ships no types


def _drain(core: Callable[[], Core], worker: str, queue: str, served: Sequence[str]) -> None:
    """Run jobs until none is ready, for a second at least, or ten if no other message waits for a process.

    Then another wake-up follows for each queue with ready jobs. Another host may take that, so it is rarely
    sent. ``queue`` comes first for half a second, then the others in turn: none waits until another is empty.
    """
    begun = turned = time.monotonic()

    def goes_on() -> bool:
        took = time.monotonic() - begun
        is_over = took > _LONG_SLICE_S or (took > _SLICE_S and attendance.is_wanted(begun))
        return not is_over and not attendance.is_stopping()

    following = Following(worker, [queue, *(each for each in served if each != queue)], goes_on)
    try:
        found, woken = core(), True
        if attendance.is_misplaced():  # the maintenance process compares, so this one waits for no spool
            found.install.require()
        worker_context = found.worker_context
        while following.claimed or goes_on():
            if not _run_next(worker_context, following, woken=woken):
                return
            woken = False
            if time.monotonic() - turned > _TURN_S:
                turned, following.queues = time.monotonic(), [*following.queues[1:], following.queues[0]]
        worker_context.store.wake(served)
    except JobsUnavailable:
        _log.warning("job.left_to_lease")
    except Exception as exc:  # noqa: BLE001 -- the top of the worker: another wake-up follows
        _log.exception("worker.crashed", error=type(exc).__name__)


def _run_next(worker_context: WorkerContext, following: Following, *, woken: bool) -> bool:
    try:
        return run_next(worker_context, following, woken=woken)
    except JobsUnavailable:
        if not following.claimed:  # else Redis may be back for that job
            raise
        _log.warning("job.left_to_lease")
    except KmsError as exc:
        if count := _bound.passes(exc.code):
            _log.warning("job.refused", code=exc.code, count=count)
    except Exception as exc:  # noqa: BLE001 -- of one job: its lease runs out, and attempts are bounded
        _log.exception("job.crashed", error=type(exc).__name__)
    return True

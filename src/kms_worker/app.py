"""Builds the Celery application of the worker. Our own messages carry a job id; all else is in the core."""

import os
from collections.abc import Callable
from typing import Final

import structlog
from celery import Celery, signals

from kms_core.container import Core, build_intake
from kms_core.container import build as build_core
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import FILES
from kms_core.jobs.store import broker
from kms_core.jobs.store.broker_messages import TASK
from kms_core.jobs.store.usage_flush import UsageFlush
from kms_core.observability import tracing
from kms_core.redis_client import celery_options
from kms_core.settings.model import Settings
from kms_protocol.errors import JobsUnavailable, KmsError
from kms_worker import kombu_patches, rotation, submit
from kms_worker.refusals import LogBound, Refusals
from kms_worker.submit import Pulse

# After so long Redis gives out a kms.submit again whose worker was killed: nothing else brings it back.
_VISIBILITY_S: Final = 600
_log = structlog.get_logger(__name__)
_bound: Final = LogBound()

CONFIGURATION: Final[dict[str, object]] = {
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_ignore_result": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_default_queue": FILES,
    "task_track_started": False,
    "task_send_sent_event": False,
    "worker_send_task_events": False,
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
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "unacked_restore_limit": 100,  # of one look, or a list of junk would keep the loop for a minute
    "socket_timeout": 10,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "global_keyprefix": "kms:",
    "confirm_publish": True,  # RabbitMQ: a nudge is sent once a majority has it
}


def build(settings: Settings, name: str, pulse: Pulse) -> Celery:
    """The application of the worker ``name``: a task that runs a job, and one that takes sealed messages.

    Raises ConfigurationError.
    """
    traced = settings.kms.traces
    tracing.check(enabled=traced.enabled)
    kombu_patches.install()
    app = Celery("kms-worker", set_as_current=False)
    app.conf.update(CONFIGURATION | celery_options(settings.kms.redis, TRANSPORT))
    signals.setup_logging.connect(_keep_our_logs)
    cores: dict[int, Core] = {}
    nudge = broker.nudge_through(app, settings.kms.redis)

    def core() -> Core:
        """Each process of the pool has its own connections: nothing is shared across a fork."""
        if os.getpid() not in cores:
            tracing.configure("kms-worker", enabled=traced.enabled, endpoint=traced.endpoint)
            cores[os.getpid()] = made = build_core(settings, "worker", nudge)
            teller = UsageFlush(made.kms.tally, made.shop.store.redis)
            teller.start()
            made.keeper.start()
            signals.worker_process_shutdown.connect(lambda **_: teller.stop(), weak=False)
            signals.worker_process_shutdown.connect(lambda **_: made.keeper.stop(), weak=False)
            signals.worker_process_shutdown.connect(lambda **_: tracing.stop(), weak=False)
        return cores[os.getpid()]

    @app.task(name=TASK)  # type: ignore[untyped-decorator]  # Celery ships no types
    def run(job_id: str) -> None:
        _run(job_id, core, name)

    rotation.register(app, core, settings, name)
    submit.register(
        app,
        lambda: build_intake(settings, core().desk),
        name,
        pulse,
        lambda: Refusals(lambda: core().shop.store.redis),
    )
    return app


def _run(job_id: str, core: Callable[[], Core], worker: str) -> None:
    try:
        run_job(job_id, core().shop, f"{worker}/{os.getpid()}")
    except JobsUnavailable:
        _log.warning("job.left_to_lease", job_id=job_id)
    except KmsError as exc:  # a record that is gone, or was not written by this service
        if count := _bound.passes(exc.code):  # anybody who writes to the broker may send any id
            _log.warning("job.refused", job_id=job_id, code=exc.code, count=count)
    except Exception as exc:  # noqa: BLE001 -- the top of the worker: the lease runs out, and attempts are bounded
        _log.exception("job.crashed", job_id=job_id, error=type(exc).__name__)


def _keep_our_logs(**_: object) -> None:
    """Connected so that Celery leaves logging alone."""

"""One worker: Celery's parent with its pool, heartbeat, watchdog and metrics, and its maintenance process."""

import gc
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

# Celery imports these three when they are first used. Two threads that do so at once end the worker, since
# they import each other in a circle.
import celery.app.amqp
import celery.app.control
import celery.events  # noqa: F401
from celery import Celery, signals
from celery.platforms import SecurityWarning
from celery.worker.consumer import Consumer

from kms_core import secure_memory
from kms_core.auth.authenticator import MetricsAccess
from kms_core.container import Core, build_intake, build_monitor
from kms_core.container import build as build_core
from kms_core.documents.local_copy import CopyPoll
from kms_core.jobs.events import webhook
from kms_core.jobs.events.outbox import Outbox, WebhookDispatcher
from kms_core.jobs.execution import attendance
from kms_core.jobs.hosts.install import InstallWatch
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.recovery.spool_cleanup import SpoolCleanup
from kms_core.jobs.store import broker, processes
from kms_core.jobs.store.heartbeats import Heartbeat, idle_s
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread, SharedTime
from kms_core.proxies import Proxies
from kms_core.redis_client import check_servers
from kms_core.settings.lint import SETTINGS, unaccepted
from kms_core.settings.model import Settings
from kms_worker import app as worker_app
from kms_worker import consumer, metrics_server, rotation, submit
from kms_worker.maintenance import Maintenance
from kms_worker.metrics_server import MetricsApp, MetricsServer
from kms_worker.pool import Slots
from kms_worker.refusals import Refusals
from kms_worker.watchdog import Watchdog

_LEAVE_S: Final = 2.0  # for the last word to Redis; a worker whose Redis is away need not wait for it
_EXIT_ORPHAN: Final = 1
_between_forks: Final = threading.Lock()
"""Held by each thread of the parent while it works, and by the parent while it forks.

A forked process copies a lock that a thread holds as taken, for good, such as that of the metrics. Celery's
parent forks a process whenever one died, while periodic threads run beside it.
"""


def run(loaded: Settings) -> int:
    """Work until a signal; the exit code."""
    secure_memory.protect(strict=loaded.is_prod)
    name = processes.new_name()
    check_servers(loaded.kms.redis)
    pulse = SharedTime()
    app = worker_app.build(loaded, name, pulse)
    core = build_core(loaded, "worker", broker.notify_through(app, loaded.kms.redis))
    jobs, store = loaded.kms.jobs, core.worker_context.store
    intake = build_intake(loaded, core.submitter)
    served = (*jobs.queues, *submit.queues(intake))
    consumer.install()
    submit_bytes = intake.text_length if intake else 0
    checked = partial(consumer.CheckedConsumer, refusals=Refusals(pulse.note), submit_bytes=submit_bytes)

    heartbeat = Heartbeat(store, name)
    beside: list[PeriodicThread] = [heartbeat]
    _watch_pool(loaded, store, name, beside)
    upkeep = _begin_maintenance(loaded, name)
    server = _serve_metrics(loaded, core, heartbeat.serves)
    signals.worker_ready.connect(lambda **_: heartbeat.serve(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: heartbeat.stop(), weak=False)
    _start(heartbeat)  # before it consumes: who looks while its first job runs must find a worker
    Watchdog(
        attendance.PATIENCE_S,
        partial(_can_take, app, store, served),
        lambda: min(time.monotonic() - pulse.at, idle_s(store, name)),
    ).start()
    try:
        return _consume(app, name, jobs.concurrency, served, checked)
    finally:
        for thread in beside:
            thread.stop()
        if server is not None:
            server.shutdown()
        upkeep.end(_LEAVE_S)
        for thread in beside:
            thread.join(_LEAVE_S)


def _begin_maintenance(loaded: Settings, name: str) -> Maintenance:
    _prepare_children()
    upkeep = Maintenance(partial(_prepare_child, os.getpid()), partial(_maintenance, loaded, name))
    upkeep.start()
    return upkeep


def _maintenance(loaded: Settings, name: str) -> list[PeriodicThread]:
    """Build the periodic work that waits for more than Redis, with connections of its own."""
    app = worker_app.build(loaded, name, SharedTime())
    core = build_core(loaded, "worker", broker.notify_through(app, loaded.kms.redis))
    store, install, endpoints = core.worker_context.store, core.install, webhook.endpoints(loaded)
    monitor = build_monitor(loaded, store.redis)
    core.audit_maintenance.begun = monitor.wake
    return [
        core.watch,
        InstallWatch(install, attendance.set_misplaced),
        processes.Presence(store, "worker", name),
        Reaper(store, name, install.require),
        SpoolCleanup(store, core.worker_context.spool, name, install.require, install.may_sweep),
        rotation.Clock(app, store, name),
        monitor,
        *(CopyPoll(copy) for copy in core.copies),
        *([WebhookDispatcher(Outbox(store, endpoints), endpoints, name)] if endpoints else []),
        core.audit_maintenance,
    ]


def _start(thread: PeriodicThread) -> None:
    """Start a thread whose rounds no fork interrupts: it waits for Redis alone."""
    thread.fork_lock = _between_forks
    thread.start()


def _serve_metrics(loaded: Settings, core: Core, is_ready: Callable[[], bool]) -> MetricsServer | None:
    metrics.show_weak(SETTINGS, unaccepted(loaded))
    settings, policy = loaded.kms.server, core.kms.policy
    scraping = MetricsAccess(settings.metrics, core.authenticator, policy, Proxies(settings.trusted_proxies))
    app = MetricsApp(scraping, settings.allowed_hosts, is_ready, core.watch.export)
    return metrics_server.serve(loaded.kms.bind, loaded.kms.port + 1, app)


def _watch_pool(loaded: Settings, store: JobStore, name: str, beside: list[PeriodicThread]) -> None:
    """Share with the pool when to stop. Once there is a pool, start its watch, and add it to ``beside``."""
    shared, jobs = attendance.Attendance(), loaded.kms.jobs
    attendance.share(shared)
    signals.worker_shutting_down.connect(
        lambda **_: shared.stops_at.set(time.monotonic() + jobs.stop_s), weak=False
    )

    def watch(sender: Consumer, **_: object) -> None:
        # Celery ends a worker whose child dies before the first message; later ones it replaces, and so this.
        sender.pool.did_start_ok = lambda: True
        slots = Slots(shared, store, name, sender)
        beside.append(slots)
        _start(slots)

    signals.worker_ready.connect(watch, weak=False)


def _can_take(app: Celery, store: JobStore, served: Sequence[str]) -> bool:
    """Return whether a job or a message waits that the worker could take. Raises JobsUnavailable."""
    is_ready = store.has_ready(*store.rules.queues)
    if is_ready or submit.QUEUE not in served:
        return is_ready
    with app.connection_for_read() as connection:
        return broker.messages(connection, submit.QUEUE) > 0


def _prepare_children() -> None:
    """Have each forked child lock its memory, and share the pages of imported modules with the parent.

    Billiard keeps the memory that it shares in files that it unlinks at once. They need no folder of their
    own, which a killed worker would leave behind.
    """
    multiprocessing.current_process()._config["tempdir"] = tempfile.gettempdir()  # type: ignore[attr-defined]  # noqa: SLF001 -- of the standard library, which has no setting for it
    os.register_at_fork(
        before=_between_forks.acquire,
        after_in_parent=_between_forks.release,
        after_in_child=_between_forks.release,
    )
    signals.worker_process_init.connect(partial(_prepare_child, os.getpid()), weak=False)
    gc.collect()
    gc.freeze()  # or the first collection in a child copies them


def _prepare_child(parent: int, **_: object) -> None:
    """Lock the memory of a forked process; end the process if its parent has ended.

    ``parent`` is the process id of the worker's main process. A fork inherits the mark against core dumps,
    but not the lock of memory. Celery has the kernel kill a child when its parent ends, which has no effect
    if the parent ended before Celery asked for that.
    """
    if os.getppid() != parent:
        os._exit(_EXIT_ORPHAN)
    secure_memory.lock()


def _consume(
    app: Celery, name: str, concurrency: int, queues: Sequence[str], consumer: Callable[..., Consumer]
) -> int:
    # Celery warns of pickle under root; this worker accepts JSON alone.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    worker = app.Worker(
        consumer_cls=consumer,
        hostname=f"kms@{name}",
        concurrency=concurrency,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
        quiet=True,
        queues=",".join(queues),
    )
    worker.start()
    return int(worker.exitcode or 0)

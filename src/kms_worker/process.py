"""One worker process: Celery's parent with its pool, and beside it presence, caretaker, watchdog, metrics."""

import gc
import socket
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from celery import Celery, signals
from celery.platforms import SecurityWarning
from celery.worker.consumer import Consumer

from kms_core import server_memory
from kms_core.audit_setup import build_watch
from kms_core.auth.metrics_access import MetricsAccess
from kms_core.container import build as build_core
from kms_core.container import build_intake
from kms_core.jobs.events import webhook
from kms_core.jobs.events.dispatcher import WebhookDispatcher
from kms_core.jobs.events.outbox import Outbox
from kms_core.jobs.model import QUEUES, QueuePriority
from kms_core.jobs.recovery.heartbeat import Heartbeat
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.store import broker
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from kms_core.settings.lint import SETTINGS, unaccepted
from kms_core.settings.model import Settings
from kms_worker import app as worker_app
from kms_worker import elements, fork_lock, metrics_server, properties, rotation, submit
from kms_worker.consumer import CheckedConsumer, never_decompress
from kms_worker.elements import Checks
from kms_worker.refusals import Refusals
from kms_worker.watchdog import Watchdog

_LEAVE_S: Final = 2.0  # for the last word to Redis; a worker whose Redis is away need not wait for it


class _Beside(Protocol):
    """A thread of the parent, beside the pool."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


def run(loaded: Settings) -> int:
    """Work until a signal; the exit code."""
    server_memory.protect(strict=loaded.is_prod)
    # Celery warns of pickle under root; this worker accepts JSON alone.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    name = f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}"
    pulse = submit.Pulse()
    app = worker_app.build(loaded, name, pulse)
    core = build_core(loaded, "worker", broker.nudge_through(app, loaded.kms.redis))
    metrics.show_weak(SETTINGS, unaccepted(loaded))
    jobs, store = loaded.kms.jobs, core.shop.store
    intake = build_intake(loaded, core.desk)
    served = (*jobs.queues, *submit.queues(intake))
    refusals = Refusals(lambda: store.redis, beat=pulse.beat)
    consumer = _checking(Checks(refusals, intake.text_length if intake else 0))

    def waiting() -> Mapping[QueuePriority, int]:
        with app.connection_for_read() as connection:
            return broker.waiting(connection, (*QUEUES, submit.QUEUE))

    presence = Heartbeat(store, name, working=fork_lock.between_forks)
    beside: tuple[_Beside, ...] = (
        presence,  # first, before it consumes: who looks while its first job runs must find a worker
        Reaper(store, core.shop.spool, name, waiting, working=fork_lock.between_forks),
        rotation.Clock(app, store, name, working=fork_lock.between_forks),
        build_watch(loaded, store.redis, working=fork_lock.between_forks),
        *_couriers(loaded, store, name),
    )
    watchdog = Watchdog(served, jobs.watchdog_s, waiting, lambda: min(pulse.idle_s(), store.idle_s(name)))
    server = metrics_server.serve(
        loaded.kms.bind,
        loaded.kms.port + 1,
        MetricsAccess(loaded.kms.server.metrics, core.doors, core.kms.policy, Proxies.of(loaded.kms.server)),
        loaded.kms.server.allowed_hosts,
    )
    _prepare_children()
    signals.worker_shutting_down.connect(lambda **_: presence.stop(), weak=False)
    for thread in beside:
        thread.start()
    watchdog.start()
    try:
        return _consume(app, name, jobs.concurrency, served, consumer)
    finally:
        for thread in beside:
            thread.stop()
        if server is not None:
            server.shutdown()
        presence.join(_LEAVE_S)


def _prepare_children() -> None:
    """Have each forked child lock its memory, and share the pages of what was imported with the parent."""
    fork_lock.install()
    signals.worker_process_init.connect(_lock_child, weak=False)
    gc.collect()
    gc.freeze()  # or the first collection in a child copies them


def _checking(checks: Checks) -> Callable[..., Consumer]:
    """A consumer whose messages are checked, as those of every channel of this process."""
    never_decompress()
    elements.install(checks)
    properties.install()
    return partial(CheckedConsumer, checks=checks)


def _couriers(loaded: Settings, store: JobStore, name: str) -> list[WebhookDispatcher]:
    """One, if there is an endpoint that it could deliver to."""
    endpoints = webhook.endpoints(loaded)
    outbox = Outbox(store, endpoints)
    return [WebhookDispatcher(outbox, endpoints, name, working=fork_lock.between_forks)] if endpoints else []


def _lock_child(**_: object) -> None:
    """A fork inherits that it cannot be dumped, and no lock of memory."""
    server_memory.lock_again()


def _bear_early_deaths(sender: Consumer, **_: object) -> None:
    """Celery ends a worker whose child dies before the first message; later ones it replaces, and so this."""
    sender.pool.did_start_ok = lambda: True


def _consume(
    app: Celery, name: str, concurrency: int, queues: Sequence[str], consumer: Callable[..., Consumer]
) -> int:
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
    signals.worker_ready.connect(_bear_early_deaths, weak=False)
    worker.start()
    return int(worker.exitcode or 0)

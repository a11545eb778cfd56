"""One worker process: Celery's parent with its pool, and beside it caretaker, watchdog and metrics."""

import socket
import uuid
import warnings
from collections.abc import Mapping, Sequence

from celery import Celery, signals
from celery.platforms import SecurityWarning
from celery.worker.consumer import Consumer

from kms_core.auth.scraping import Scraping
from kms_core.jobs import webhooks
from kms_core.jobs.build import build as build_core
from kms_core.jobs.build import build_intake
from kms_core.jobs.caretaker import Caretaker
from kms_core.jobs.model import QUEUES, Lane
from kms_core.jobs.outbox import Outbox
from kms_core.settings import Settings
from kms_worker import app as worker_app
from kms_worker import broker, exposition, forking, rotation, submit
from kms_worker.courier import Courier
from kms_worker.watchdog import Watchdog


def run(loaded: Settings) -> int:
    """Work until a signal; the exit code."""
    # Celery warns of pickle under root; this worker accepts JSON alone.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    name = f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}"
    pulse = submit.Pulse()
    app = worker_app.build(loaded, name, pulse)
    core = build_core(loaded, "worker", broker.nudge_through(app))
    jobs, store = loaded.kms.jobs, core.shop.store
    served = (*jobs.queues, *submit.queues(build_intake(loaded, core.desk)))

    def waiting() -> Mapping[Lane, int]:
        with app.connection_for_read() as connection:
            return broker.waiting(connection, (*QUEUES, submit.QUEUE))

    caretaker = Caretaker(store, core.shop.spool, name, waiting, working=forking.between_forks)
    clock = rotation.Clock(app, store, name, working=forking.between_forks)
    watchdog = Watchdog(served, jobs.watchdog_s, waiting, lambda: min(pulse.idle_s(), store.idle_s(name)))
    endpoints = webhooks.endpoints(loaded)
    courier = Courier(Outbox(store, endpoints), endpoints, name, working=forking.between_forks)
    server = exposition.serve(
        loaded.kms.bind,
        loaded.kms.port + 1,
        Scraping(loaded.kms.server.metrics, core.doors, core.kms.policy),
    )
    forking.install()
    caretaker.start()
    clock.start()
    watchdog.start()
    if endpoints:
        courier.start()
    try:
        return _consume(app, name, jobs.concurrency, served)
    finally:
        caretaker.stop()
        clock.stop()
        courier.stop()
        if server is not None:
            server.shutdown()


def _bear_early_deaths(sender: Consumer, **_: object) -> None:
    """Celery ends a worker whose child dies before the first message; later ones it replaces, and so this."""
    sender.pool.did_start_ok = lambda: True


def _consume(app: Celery, name: str, concurrency: int, queues: Sequence[str]) -> int:
    worker = app.Worker(
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

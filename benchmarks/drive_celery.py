"""A bare Celery worker with a task that does nothing but say so: the floor of any job on this broker.

``python -m benchmarks.drive_celery BROKER_URL REDIS_URL``. Settings and pool are those of our worker.
"""

import functools
import os
import sys
import warnings

import redis
from celery import Celery
from celery.platforms import SecurityWarning

from kms_worker.app import CONFIGURATION, TRANSPORT

QUEUE = "bench"
TASK = "bench.nothing"
DONE = "kms:bench:done"


def producer(broker_url: str) -> Celery:
    """The application of a sender; the worker's adds the task."""
    app = Celery("bench", broker=broker_url, set_as_current=False)
    app.conf.update(CONFIGURATION | {"task_default_queue": QUEUE, "broker_transport_options": TRANSPORT})
    return app


def main() -> None:
    broker_url, redis_url = sys.argv[1:]
    warnings.filterwarnings("ignore", category=SecurityWarning)
    app = producer(broker_url)
    lines = functools.cache(lambda _process: redis.Redis.from_url(redis_url))

    @app.task(name=TASK)  # type: ignore[untyped-decorator]  # Celery ships no types
    def nothing(number: int) -> None:
        lines(os.getpid()).lpush(DONE, number)

    app.Worker(
        concurrency=2,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
        quiet=True,
        queues=QUEUE,
    ).start()


if __name__ == "__main__":
    main()

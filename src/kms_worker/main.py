"""The ``kms-worker`` program: settings, the Celery worker, and beside it the caretaker and metrics."""

import argparse
import os
import resource
import socket
import sys
import tempfile
import uuid
import warnings
from pathlib import Path

from kms_core import logs, settings
from kms_core.errors import EXIT_CONFIGURATION, ConfigurationError
from kms_core.settings import Settings


def main() -> int:
    """Run until a signal. Exit code 78 means wrong configuration."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys
    try:
        loaded = settings.load(_arguments().config, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        with tempfile.TemporaryDirectory(prefix="kms-metrics-") as folder:
            # prometheus_client chooses its storage when it is imported
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            return _work(loaded, folder)
    except ConfigurationError as exc:
        sys.stderr.write(f"kms-worker: error: {exc.detail}\n")
        return EXIT_CONFIGURATION


def _work(loaded: Settings, metrics_folder: str) -> int:
    from celery.platforms import SecurityWarning  # noqa: PLC0415 -- as below

    from kms_core.jobs.build import build as build_core  # noqa: PLC0415 -- after the metrics folder is named
    from kms_core.jobs.caretaker import Caretaker  # noqa: PLC0415 -- as above
    from kms_worker import app as worker_app  # noqa: PLC0415 -- as above
    from kms_worker import broker, exposition  # noqa: PLC0415 -- as above

    # It warns of pickle under root; this worker accepts JSON alone.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    app = worker_app.build(loaded)
    core = build_core(loaded, "worker", broker.nudge_through(app))
    name = f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}"

    def queue_length() -> int:
        with app.connection_for_read() as connection:
            return broker.waiting(connection)

    caretaker = Caretaker(core.shop.store, core.shop.spool, name, queue_length)
    server = exposition.serve(loaded.kms.bind, loaded.kms.port + 1, metrics_folder)
    caretaker.start()
    try:
        worker = app.Worker(
            hostname=f"kms@{name}",
            concurrency=loaded.kms.jobs.concurrency,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel="WARNING",
            quiet=True,
        )
        worker.start()
        return int(worker.exitcode or 0)
    finally:
        caretaker.stop()
        if server is not None:
            server.shutdown()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kms-worker", description="Runs jobs.")
    parser.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual places)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

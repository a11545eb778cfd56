"""The ``kms-worker`` program: settings, the Celery worker, and beside it the caretaker and metrics."""

import argparse
import os
import resource
import shutil
import socket
import sys
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
        # prometheus_client chooses its storage when it is imported
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder = str(_metrics_folder(loaded))
        return _work(loaded, folder)
    except ConfigurationError as exc:
        sys.stderr.write(f"kms-worker: error: {exc.detail}\n")
        return EXIT_CONFIGURATION


def _work(loaded: Settings, metrics_folder: str) -> int:
    from celery.platforms import SecurityWarning  # noqa: PLC0415 -- as below

    from kms_core.jobs.build import build as build_core  # noqa: PLC0415 -- after the metrics folder is named
    from kms_core.jobs.build import build_intake  # noqa: PLC0415 -- as above
    from kms_core.jobs.caretaker import Caretaker  # noqa: PLC0415 -- as above
    from kms_core.jobs.model import QUEUES  # noqa: PLC0415 -- as above
    from kms_worker import app as worker_app  # noqa: PLC0415 -- as above
    from kms_worker import broker, exposition, submit  # noqa: PLC0415 -- as above
    from kms_worker.watchdog import Watchdog  # noqa: PLC0415 -- as above

    # It warns of pickle under root; this worker accepts JSON alone.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    name = f"{socket.gethostname()}:{uuid.uuid4().hex[:8]}"
    pulse = submit.Pulse()
    app = worker_app.build(loaded, name, pulse)
    core = build_core(loaded, "worker", broker.nudge_through(app))
    jobs, store = loaded.kms.jobs, core.shop.store
    served = (*jobs.queues, *submit.queues(build_intake(loaded, core.desk)))

    def waiting() -> dict[str, int]:
        with app.connection_for_read() as connection:
            return broker.waiting(connection, (*QUEUES, submit.QUEUE))

    caretaker = Caretaker(store, core.shop.spool, name, waiting)
    watchdog = Watchdog(served, jobs.watchdog_s, waiting, lambda: min(pulse.idle_s(), store.idle_s(name)))
    server = exposition.serve(loaded.kms.bind, loaded.kms.port + 1, metrics_folder)
    caretaker.start()
    watchdog.start()
    try:
        worker = app.Worker(
            hostname=f"kms@{name}",
            concurrency=jobs.concurrency,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel="WARNING",
            quiet=True,
            queues=",".join(served),
        )
        worker.start()
        return int(worker.exitcode or 0)
    finally:
        caretaker.stop()
        if server is not None:
            server.shutdown()


def _metrics_folder(loaded: Settings) -> Path:
    """Empty: what a killed predecessor left would be counted again."""
    folder = loaded.state_dir / "run" / f"metrics-{socket.gethostname()}-{loaded.kms.port + 1}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kms-worker", description="Runs jobs.")
    parser.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual places)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""The ``kms-worker`` program: settings, the Celery worker, and beside it the reaper and metrics."""

import argparse
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from kms_core import secure_memory
from kms_core.observability import logs, multiprocess_metrics
from kms_core.settings import files, lint
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, ConfigurationError


def main() -> int:
    """Run until a signal. Exit code 78 means wrong configuration."""
    received: list[int] = []  # signals

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        sys.exit(0)  # which is lost in a finalizer: it is raised again once it is ready

    signal.signal(signal.SIGTERM, stop)  # until Celery has its own handler: no job is in hand
    try:
        secure_memory.forbid_dumps()
        file = files.for_server(parser().parse_args().config, os.environ)
        loaded = load_settings(file, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        lint.warn(loaded)
        files.write_note(file, os.environ)
        multiprocess_metrics.share({multiprocess_metrics.FOLDER: str(_metrics_folder(loaded))})
        from celery import signals  # noqa: PLC0415 -- takes long to import

        from kms_core import container, key_opening  # noqa: PLC0415 -- and these declare metrics
        from kms_worker import process  # noqa: PLC0415 -- as above

        signals.worker_ready.connect(
            lambda **_: signal.raise_signal(signal.SIGTERM) if received else None, weak=False
        )
        key_opening.begin(loaded)
        container.check(loaded)
        return process.run(loaded)
    except (ConfigurationError, OSError) as exc:  # a full disk, a directory of another user
        sys.stderr.write(f"kms-worker: error: {getattr(exc, 'detail', exc)}\n")
        return EXIT_CONFIGURATION if isinstance(exc, ConfigurationError) else EXIT_OTHER


def _metrics_folder(loaded: Settings) -> Path:
    """Empty: what a killed predecessor left would be counted again."""
    folder = loaded.state_dir / "run" / f"metrics-{socket.gethostname()}-{loaded.kms.port + 1}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    return folder


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="kms-worker", description="Runs jobs.")
    made.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual places)")
    return made


if __name__ == "__main__":
    sys.exit(main())

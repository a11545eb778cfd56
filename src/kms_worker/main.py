"""The ``kms-worker`` program: settings, the Celery worker, and beside it the caretaker and metrics."""

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path

from kms_core import secure_memory
from kms_core.observability import logs
from kms_core.settings import lint
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_protocol.errors import EXIT_CONFIGURATION, ConfigurationError


def main() -> int:
    """Run until a signal. Exit code 78 means wrong configuration."""
    try:
        secure_memory.forbid_dumps()
        loaded = load_settings(_arguments().config, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        lint.warn(loaded)
        # prometheus_client chooses its storage when it is imported
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_metrics_folder(loaded))
        from kms_core import keyring  # noqa: PLC0415 -- and these declare metrics
        from kms_worker import process  # noqa: PLC0415 -- as above

        keyring.check(loaded)
        return process.run(loaded)
    except ConfigurationError as exc:
        sys.stderr.write(f"kms-worker: error: {exc.detail}\n")
        return EXIT_CONFIGURATION


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

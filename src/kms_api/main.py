"""The ``kms-service`` program: load settings, check the exposure, serve alone or as several."""

import argparse
import os
import sys
from pathlib import Path

from kms_core import secure_memory
from kms_core.observability import logs
from kms_core.settings import lint
from kms_core.settings.load import check_exposure
from kms_core.settings.load import load as load_settings
from kms_protocol.errors import EXIT_CONFIGURATION, ConfigurationError


def main() -> int:
    """Run until a signal. Exit codes: 78 wrong configuration, 69 port not free."""
    arguments = _arguments()
    try:
        secure_memory.forbid_dumps()
        loaded = load_settings(arguments.config, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        check_exposure(loaded)
        if not arguments.listener:  # else the leader has told
            lint.warn(loaded)
        if loaded.kms.server.processes > 1 and not arguments.listener:
            from kms_api.server import supervisor  # noqa: PLC0415 -- a leader serves nothing

            return supervisor.lead(loaded, arguments.config)
        from kms_api.server import process  # noqa: PLC0415 -- and needs none of this

        return process.serve(loaded, arguments.listener)
    except ConfigurationError as exc:
        sys.stderr.write(f"kms-service: error: {exc.detail}\n")
        return EXIT_CONFIGURATION


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kms-service", description="The HTTP front of the KMS.")
    parser.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual places)")
    parser.add_argument("--listener", type=int, action="append", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

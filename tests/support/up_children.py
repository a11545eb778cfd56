"""Programs that test_up starts: ``kms up`` with small children in place of the API and the worker.

``up PORT…`` runs the supervisor; ``api`` and ``worker`` are its children, which note what happens to
them in the file that STAND_IN_NOTES names. What they do wrong is in STAND_IN_<NAME>.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from unittest.mock import patch

from kms_cli.local import up
from kms_cli.main import run
from kms_core.programs import supervisor
from kms_core.programs.liveness import is_alive
from kms_core.programs.supervisor import Child
from kms_core.settings.model import Settings


def programs(settings: Settings, env: Mapping[str, str]) -> Sequence[Child]:
    this = [sys.executable, __file__]
    return (
        Child("api", [*this, "api"], lambda: is_alive("127.0.0.1", settings.kms.port), env, grace_s=2),
        Child("worker", [*this, "worker"], lambda: True, env, grace_s=2),
    )


def run_up() -> int:
    quick = patch.multiple(
        supervisor, FIRST_DELAY_S=0.05, LONGEST_DELAY_S=0.4, START_TIMEOUT_S=10.0, POLL_S=0.01
    )
    with patch.multiple(up, service_programs=programs), quick:
        return run(["up", "--state-dir", sys.argv[2], "--port", sys.argv[3]])


def note(name: str, **what: object) -> None:
    line = json.dumps({"name": name, "pid": os.getpid(), "at": time.monotonic(), **what})
    with Path(os.environ["STAND_IN_NOTES"]).open("a") as file:
        file.write(f"{line}\n")


def run_child(name: str) -> int:
    fault = os.environ.get(f"STAND_IN_{name.upper()}", "")

    def on_signal(number: int, _frame: FrameType | None) -> None:
        note(name, event=signal.Signals(number).name)
        if fault != "stubborn":
            sys.exit(0)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    helper = subprocess.Popen(["sleep", "60"]) if fault == "helped" else None  # like a pool process
    kept = {key: value for key, value in os.environ.items() if key.startswith("KMS_")}
    note(name, event="start", env=kept, helper=helper and helper.pid)
    if fault.isdigit():
        sys.stderr.write(f"{name}: leaving\n")
        return int(fault)
    if name == "api":
        http.server.HTTPServer(("127.0.0.1", int(os.environ["KMS_PORT"])), Livez).serve_forever(0.05)
    while True:
        time.sleep(0.05)


class Livez(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/livez" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name in http.server
        """Say nothing."""


if __name__ == "__main__":
    sys.exit(run_up() if sys.argv[1] == "up" else run_child(sys.argv[1]))

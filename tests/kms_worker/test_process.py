"""What is there before a worker starts its threads."""

import subprocess
import sys

LAZY = ("celery.app.amqp", "celery.app.control", "celery.events.dispatcher", "celery.events.receiver")


def test_modules_that_celery_imports_late_are_there_before_threads() -> None:
    """Two threads that import them at once ended a worker at its start: deadlock detected by _ModuleLock."""
    code = f"import sys, kms_worker.process; print(*(set({LAZY!r}) - sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)

    assert (done.stdout.strip(), done.stderr) == ("", "")

"""What is there before a worker starts its threads, and what its watchdog goes by."""

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

from celery import Celery

from kms_core.container import Core
from kms_core.jobs.spec import FILES
from kms_worker import process
from support.job_stores import accepted, store_of, with_jobs

LAZY = ("celery.app.amqp", "celery.app.control", "celery.events.dispatcher", "celery.events.receiver")


def test_modules_that_celery_imports_late_are_there_before_threads() -> None:
    """Two threads that import them at once ended a worker at its start: deadlock detected by _ModuleLock."""
    code = f"import sys, kms_worker.process; print(*(set({LAZY!r}) - sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)

    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_worker_that_is_killed_leaves_no_folder(tmp_path: Path) -> None:
    """The pool of Celery makes this value, in a file in a folder for temporary ones."""
    code = (
        "import os, billiard, kms_worker.process as worker; worker._prepare_children(); "
        "billiard.get_context().Value('i'); os.kill(os.getpid(), 9)"
    )
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environ, capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (-9, b"")
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_queues_that_others_serve_are_none_that_a_worker_could_take(core: Core) -> None:
    """Or its watchdog would end it, since it takes none."""
    store, no_broker = store_of(core, with_jobs(queues=(FILES,))), cast("Celery", None)

    store.submit(accepted(items=1, source="items"))
    assert not process._can_take(no_broker, store, [FILES])  # noqa: SLF001 -- what the watchdog asks

    store.submit(accepted())
    assert process._can_take(no_broker, store, [FILES])  # noqa: SLF001 -- as above

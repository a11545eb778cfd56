"""A worker whose processes stop at a step of named jobs and hold them there, until it is killed.

Run by its path with the Python of a version, so it imports nothing of the tests: ``held_worker.py FOLDER``.
It makes the file ``FOLDER/<step>`` once a process is held at that step.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final

FILE: Final = "kms_core.jobs.execution.one_file:FileWork"
ATTEMPTS: Final = "kms_core.jobs.store.attempts:AttemptStore"
LAST_PART: Final = 2  # of three


def hold(step: str) -> None:
    """Say that this process is at the step, and stay there. Its lease is renewed for ``stall_s``."""
    Path(FOLDER, step).touch()
    time.sleep(600)


def replace(holder: str, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put what ``make`` makes of a method in its place."""
    place = resolve_name(holder)
    setattr(place, name, make(getattr(place, name)))


def placing(genuine: Callable[..., Any]) -> Callable[..., Any]:
    """The commit is recorded, and the target not in place yet; afterwards it is, and no end is stored."""

    def put_in_place(work: Any, *given: Any) -> None:  # noqa: ANN401 -- of either version
        source = work.job.source
        for step, name in (("recorded", "/recorded"), ("tree", "/020")):
            if source.endswith(name):
                hold(step)
        genuine(work, *given)
        if source.endswith("/placed"):
            hold("placed")

    return put_in_place


def ending(genuine: Callable[..., Any]) -> Callable[..., Any]:
    """The last part of a job over items is done, and its end is not stored; those of others are."""

    def finish(store: Any, claim: Any, *given: Any) -> None:  # noqa: ANN401 -- as above
        if getattr(claim.accepted, "part", 0) == LAST_PART:
            hold("items")
        genuine(store, claim, *given)

    return finish


def sharing(genuine: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the others once metrics are shared: importing their modules declares some."""

    def share(given: Any) -> None:  # noqa: ANN401 -- as above
        genuine(given)
        replace(FILE, "_put_in_place", placing)
        replace(ATTEMPTS, "finish", ending)

    return share


if __name__ == "__main__":
    from kms_worker.main import main

    replace("kms_core.observability.multiprocess_metrics", "share", sharing)
    FOLDER = sys.argv.pop()
    sys.exit(main())

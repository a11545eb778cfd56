"""The task ``kms.keys``: rotation by schedule, and the metrics of key versions.

A thread of the parent looks at the clock, a child of the pool talks to backends. The message is lost or late
without harm: the next one comes within a minute, and a short lock in Redis lets one attempt an hour happen
for a key.
"""

from collections.abc import Callable
from typing import Final

import structlog
from celery import Celery

from kms_core import key_rotation
from kms_core.container import Core
from kms_core.jobs.spec import MAINTENANCE
from kms_core.jobs.store import broker, usage
from kms_core.jobs.store.store import JobStore
from kms_core.observability.metrics import added_usage
from kms_core.periodic import PeriodicThread
from kms_core.settings.model import RotationSection, Settings
from kms_protocol.errors import JobsUnavailable

KEYS_TASK: Final = "kms.keys"
EVERY_S: Final = 60.0
_ATTEMPT_EVERY_S: Final = 3600.0
_log = structlog.get_logger(__name__)


def register(app: Celery, core: Callable[[], Core], settings: Settings, name: str) -> None:
    """The task that looks after keys."""

    @app.task(name=KEYS_TASK)  # type: ignore[untyped-decorator]  # Celery ships no types
    def look_after_keys() -> None:
        try:
            # Once in a while, however many messages there are.
            if core().worker_context.store.once("keys-looked", name, EVERY_S / 2):
                look_after(core(), settings.kms.rotation, name)
        except JobsUnavailable:
            _log.warning("rotation.left_to_the_next_time")
        except Exception as exc:  # noqa: BLE001 -- the top of the worker: the next message tries again
            _log.exception("rotation.crashed", error=type(exc).__name__)


def look_after(core: Core, rules: RotationSection, owner: str) -> None:
    """Update the key metrics, and rotate the keys that are due. Raises JobsUnavailable."""
    store = core.worker_context.store
    counts = added_usage(usage.shared_usage(store.redis), core.kms.usage.peek())
    due = key_rotation.find_due(core.kms.keyring, counts, rules)
    mine = [state for state in due if store.once(f"rotate:{state.key_id}", owner, _ATTEMPT_EVERY_S)]
    key_rotation.rotate_due(core.kms, mine)


class Clock(PeriodicThread):
    """Sends the message once a minute, from one worker of all."""

    def __init__(self, app: Celery, store: JobStore, name: str) -> None:
        super().__init__("rotation-clock", EVERY_S / 4, failed="rotation.round_failed")
        self._app = app
        self._store = store
        self._owner = name
        self.wake()  # the first round is at once

    def round(self) -> None:
        if self._store.once("keys", self._owner, EVERY_S):
            self._app.send_task(KEYS_TASK, queue=MAINTENANCE, argsrepr="-", kwargsrepr="-", **broker.WITHIN)

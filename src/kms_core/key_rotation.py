"""Rotates keys that are due: by the age of a version, or by the number of messages that it sealed.

A version is due after ``every_days`` or ``BUDGET_MESSAGES``; never where ``every_days`` is 0. A used budget
is always logged.

``docs/backends.md`` says what a new version is in each backend.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

import structlog

from kms_core.auth.policy import Principal
from kms_core.backends import Backend, KeyVersion
from kms_core.keyring import Key, Keyring, ask_all
from kms_core.observability import metrics
from kms_core.service import Kms
from kms_core.settings.model import RotationSection
from kms_protocol.errors import KmsError

BUDGET_MESSAGES: Final = 2**32
"""Messages that a version may seal: of more, random nonces of AES-GCM may repeat (NIST SP 800-38D §8.3)."""
SCHEDULE: Final = Principal("rotation-schedule", credential="internal")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RotationState:
    """The current version of a key in one backend: when it is due, and the used share of its budget."""

    key_id: str
    backend: str
    current: KeyVersion
    budget: float
    due_at: datetime | None


def state_of(key: Key, backend: Backend, counts: Mapping[str, int], rules: RotationSection) -> RotationState:
    """The state of a key in one backend; ``counts`` are usage counts. Raises BackendUnavailable."""
    current = backend.versions()[-1]
    messages, _ = metrics.usage_of_version(counts, key.key_id, current.version, backend.name)
    made = current.created_at
    due_at = made + timedelta(days=rules.every_days) if made is not None and rules.every_days else None
    return RotationState(key.key_id, backend.name, current, messages / BUDGET_MESSAGES, due_at)


def find_due(keyring: Keyring, counts: Mapping[str, int], rules: RotationSection) -> list[RotationState]:
    """Set the rotation metrics of all keys, and return the states that are due.

    Servers are asked at the same time. A backend that does not answer is logged and left out.
    """
    now = datetime.now(UTC)
    due = []
    pairs = [(key, backend) for key in keyring.keys.values() for backend in key.sealing]
    states = ask_all(partial(state_of, key, backend, counts, rules) for key, backend in pairs)
    for (key, backend), asked in zip(pairs, states, strict=True):
        try:
            state = asked.result()
        except KmsError as exc:
            _log.warning("rotation.unknown", key_id=key.key_id, backend=backend.name, code=exc.code)
            continue
        labels = (state.key_id, state.backend)
        is_old = state.due_at is not None and now >= state.due_at
        is_due = is_old or (rules.every_days > 0 and state.budget >= 1)
        metrics.KEY_BUDGET.labels(*labels).set(state.budget)
        metrics.KEY_ROTATION_DUE.labels(*labels).set(is_due)
        if state.current.created_at is not None:
            metrics.KEY_AGE_SECONDS.labels(*labels).set((now - state.current.created_at).total_seconds())
        if state.budget >= 1:
            _log.warning("key.budget_spent", key_id=state.key_id, key_version=state.current.version)
        if is_due:
            due.append(state)
    return due


def rotate_due(kms: Kms, due: list[RotationState]) -> None:
    """Try once to rotate each key, all at the same time.

    A failure is logged, counted and retried at the next check.
    """
    names = list(dict.fromkeys(state.key_id for state in due))
    tries = ask_all(partial(kms.rotate, SCHEDULE, key_id) for key_id in names)
    for key_id, tried in zip(names, tries, strict=True):
        try:
            made = tried.result()
        except KmsError as exc:
            metrics.KEY_ROTATIONS.labels("failed").inc()
            _log.error("key.rotation_failed", key_id=key_id, code=exc.code, reason=exc.detail)
        else:
            metrics.KEY_ROTATIONS.labels("ok").inc()
            _log.info("key.rotated", key_id=key_id, key_version=made.version)

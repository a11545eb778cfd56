"""Messages for ``kms.submit`` as a workflow makes them: with ``pyrage``, and nothing of the service."""

import base64
import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import pyrage

from service import CANARY, b64

JOB: Final = {"kind": "encrypt", "context": "env=prod", "items": [{"plaintext": b64(CANARY.encode())}]}


def in_s(seconds: float) -> str:
    """A time so far from now, as RFC 3339 has it."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def body(job: object = JOB, **changes: object) -> dict[str, object]:
    """What is sealed, with some of it changed."""
    whole = {"version": 1, "token": None, "job_id": str(uuid.uuid4()), "expires_at": in_s(600), "job": job}
    return whole | changes


def seal(recipient: str, content: Mapping[str, object] | bytes, more: Sequence[str] = ()) -> str:
    """The argument of the task, for one or more recipients."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    recipients = [pyrage.x25519.Recipient.from_str(one) for one in (recipient, *more)]
    return base64.b64encode(pyrage.encrypt(text, recipients)).decode()

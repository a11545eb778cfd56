"""Messages for ``kms.submit`` as a workflow makes them: with ``pyrage``, and nothing of the service."""

import base64
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pyrage
from celery import Celery

from support.service import CANARY, Service, b64, unb64

EXAMPLE: Final = Path(__file__).parents[2] / "examples/workflow/submit.py"
OPTIONS: Final = {"global_keyprefix": "kms:"}  # of the broker: the service's prefix
JOB: Final = {"kind": "encrypt", "context": "env=prod", "items": [{"plaintext": b64(CANARY.encode())}]}
PLAIN: Final = [f"{CANARY} {number}" for number in range(1200)]


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


# -- through the broker -----------------------------------------------------------------------------


def broker_of(service: Service) -> str:
    return service.settings.kms.redis.broker_url


def intake_recipient(service: Service) -> str:
    return str(service.get("/intake").json()["recipient"])


def send(service: Service, message: object, **options: Any) -> str:  # noqa: ANN401 -- Celery's own keywords
    """A bare Celery client, which hides nothing by itself."""
    app = Celery("workflow", broker=broker_of(service), set_as_current=False)
    app.conf.broker_transport_options = OPTIONS
    with app.connection_for_write() as connection:
        return str(
            app.send_task("kms.submit", (message,), queue="kms.submit", connection=connection, **options).id
        )


def decrypted(service: Service, ciphertexts: list[str], context: str) -> list[str]:
    items = [{"ciphertext": ciphertext} for ciphertext in ciphertexts]
    job_id = service.submit({"kind": "decrypt", "context": context, "items": items})
    service.wait(job_id, "succeeded")
    return [unb64(line["plaintext"]).decode() for line in service.lines(job_id)]


def run_example(service: Service, job: object, *options: str) -> subprocess.CompletedProcess[str]:
    """examples/workflow/submit.py with this job, as its README runs it."""
    return subprocess.run(
        [sys.executable, "-P", str(EXAMPLE), "-", "--broker", broker_of(service), *options],
        input=json.dumps(job),
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

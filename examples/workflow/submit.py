#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["celery[redis]>=5.6", "pyrage>=1.2"]
# ///
"""Hands a job to the service as a sealed Celery message, waits for its end and prints its result.

Stands alone: nothing of the service is imported. The contract is docs/celery.md.
"""

import argparse
import base64
import json
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final

import pyrage
import redis
from celery import Celery

PREFIX: Final = "/api/v1/kms"
ENDED: Final = {"succeeded", "failed", "cancelled"}
RESEND_S: Final = 30  # a broker may lose a message; sending the same one again is harmless
LATE_S: Final = 3  # a job that was accepted in the last moment is seen by then
News = tuple[str, str]
"""A state and an error code."""


def main() -> int:
    options = arguments()
    job_id = str(uuid.uuid4())
    recipient = options.recipient or ask(options.service, "/intake")["recipient"]
    message = seal(json.load(options.job), job_id, recipient, options.accept_within)
    look = events(options.events, job_id) if options.events else polls(options.service, job_id)
    app = Celery("workflow", broker=options.broker, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "kms:"}  # of Redis and Valkey
    app.conf.task_create_missing_queue_type = options.queue_type  # of RabbitMQ, as the service declares it

    news = bring_to_end(lambda: send(app, message, job_id), look, options.accept_within)
    if news is None:
        raise SystemExit(
            f"{job_id} was not accepted within {options.accept_within:g} s, and is not run later: its "
            "message was refused, or no worker took it. The log of the workers says why, beside this id"
        )
    state, code = news
    sys.stderr.write(f"{job_id} {state} {code}\n")
    if options.service:
        show_result(options.service, job_id)
    return 0 if state == "succeeded" else 1


def seal(job: object, job_id: str, recipient: str, term_s: float) -> str:
    """The argument of ``kms.submit``, taken within ``term_s`` seconds or not at all.

    The job id is ours: it makes this message harmless to repeat.
    """
    body = {
        "version": 1,
        "token": None,
        "job_id": job_id,
        "expires_at": (datetime.now(UTC) + timedelta(seconds=term_s)).isoformat(),
        "job": job,
    }
    sealed = pyrage.encrypt(json.dumps(body).encode(), [pyrage.x25519.Recipient.from_str(recipient)])
    return base64.b64encode(sealed).decode()


def send(app: Celery, message: str, job_id: str) -> None:
    app.send_task(
        "kms.submit",
        (message,),
        queue="kms.submit",
        task_id=job_id,
        argsrepr="-",  # else Celery puts the beginning of the argument into the headers
        kwargsrepr="-",
        ignore_result=True,
    )


def bring_to_end(send: Callable[[], None], look: Callable[[], News | None], term_s: float) -> News | None:
    """Send until there is a sign of the job, then wait for its end. None without a sign after ``term_s``."""
    give_up, send_again = time.monotonic() + term_s + LATE_S, 0.0
    news: News | None = None
    while news is None or news[0] not in ENDED:
        now = time.monotonic()
        if news is None and now > give_up:
            return None
        if news is None and now >= send_again:
            send()
            send_again = now + RESEND_S
        news = look() or news
    return news


def events(url: str, job_id: str) -> Callable[[], News | None]:
    """Watch the stream of transitions: no HTTP. Must begin before the message is sent."""
    server = redis.Redis.from_url(url, decode_responses=True)
    newest: Any = server.xrevrange("kms:events", count=1)
    position = newest[0][0] if newest else "0-0"

    def look() -> News | None:
        nonlocal position
        found: News | None = None
        answer: Any = server.xread({"kms:events": position}, count=1000, block=1000)
        for _, records in answer or []:
            for number, record in records:
                position = number
                if record["subject"] == job_id:
                    found = record["type"].removeprefix("kms.job."), record["code"]
        return found

    return look


def polls(service: str, job_id: str) -> Callable[[], News | None]:
    """Ask over HTTP."""

    def look() -> News | None:
        time.sleep(0.5)
        try:
            job = ask(service, f"/jobs/{job_id}")
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code == HTTPStatus.NOT_FOUND:  # no worker has taken the message yet
                return None
            raise
        return job["state"], (job["error"] or {}).get("code", "")

    return look


def show_result(service: str, job_id: str) -> None:
    """What came of each item, as NDJSON. A job from file to file has its result in its target."""
    try:
        with urllib.request.urlopen(f"{service}{PREFIX}/jobs/{job_id}/result") as answer:  # noqa: S310 -- our own
            sys.stdout.write(answer.read().decode())
    except urllib.error.HTTPError as exc:
        with exc:
            sys.stderr.write(f"{json.load(exc)['detail']}\n")


def ask(service: str, path: str) -> Any:  # noqa: ANN401 -- JSON
    with urllib.request.urlopen(f"{service}{PREFIX}{path}") as answer:  # noqa: S310 -- the address that we were given
        return json.load(answer)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "job", type=argparse.FileType("rb"), help="a job as POST /jobs takes it (JSON; - is stdin)"
    )
    parser.add_argument("--broker", required=True, help="Celery's URL of the service's broker")
    parser.add_argument(
        "--queue-type",
        choices=("quorum", "classic"),
        default="quorum",
        help="the service's [kms.redis] broker_queue_type, for RabbitMQ (quorum)",
    )
    parser.add_argument("--service", help="base URL: whom to seal to, waiting by GET, and the result")
    parser.add_argument("--recipient", help="whom to seal to, if not to be asked of the service")
    parser.add_argument(
        "--accept-within",
        type=float,
        default=60,
        metavar="SECONDS",
        help="how long the message is valid (60)",
    )
    parser.add_argument("--events", help="redis-py's URL of the service's Redis: waiting without HTTP")
    options = parser.parse_args()
    if not options.service and not (options.recipient and options.events):
        parser.error("give --service, or --recipient and --events")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""A sealed message that a killed worker had in hand: on Redis it is given out again within the hour."""

import json
import time
from pathlib import Path
from typing import Final, cast

from support.celery_messages import body, seal, send, whom
from support.service import Service, core_of
from support.waiting import until

LONGEST_S: Final = 3600


def test_message_that_a_killed_worker_had_in_hand_is_taken_within_the_hour(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.start("api")
        asked = body()
        send(service, seal(whom(service), asked))
        redis = core_of(service).worker_context.store.redis
        message = json.loads(cast("bytes", redis.rpop("kms:kms.submit")))
        properties = message["properties"]
        where = properties["delivery_info"]
        held = [message, where["exchange"], where["routing_key"]]  # as kombu notes what a worker has taken
        redis.hset("kms:unacked", properties["delivery_tag"], json.dumps(held))
        redis.zadd("kms:unacked_index", {properties["delivery_tag"]: time.time() - LONGEST_S})
        service.start("worker")

        job = f"/jobs/{asked['job_id']}"
        until(lambda: service.get(job).status_code == 200, "the message is taken again")
        service.wait(str(asked["job_id"]), "succeeded")

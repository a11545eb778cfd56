"""Waits for replicas on a server that has none, and answers that are none. Real replicas: tests/peers."""

import pytest
import redis

from kms_core.jobs.store.replicas import ReplicaWait, check_answers, verify_replicas
from kms_core.settings.load import load
from kms_core.settings.model import RedisSection
from kms_protocol.errors import ConfigurationError

NONE = RedisSection(url="", broker_url="")
ONE = RedisSection(url="", broker_url="", wait_replicas=1, wait_ms=20)
WRITES = "#!lua\nredis.call('SET', KEYS[1], ARGV[1])\nreturn {'written'}"


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_script_that_was_never_loaded_is_loaded(client: redis.Redis) -> None:
    text = f"{WRITES} -- {id(client)}"

    answer = ReplicaWait(client, ONE).run(client.register_script(text), ["kms:a"], ["b"])

    assert answer == ([b"written"], False)
    assert client.get("kms:a") == b"b"


def test_nothing_is_waited_for_without_the_setting(client: redis.Redis) -> None:
    client.set_response_callback("WAITAOF", lambda *_, **__: pytest.fail("it waits"))
    wait = ReplicaWait(client, NONE)

    assert wait.run(client.register_script(WRITES), ["kms:a"], ["b"]) == ([b"written"], True)
    assert wait.confirm()


def test_error_of_a_script_is_raised(client: redis.Redis) -> None:
    with pytest.raises(redis.ResponseError, match="broken"):
        ReplicaWait(client, ONE).run(client.register_script("return {err = 'broken'}"), [], [])


ANSWERS = [
    None,
    b"1",
    1,
    [],
    [1],
    [1, 1, 1],
    [1, b"1"],
    [1, "1"],
    [True, True],
    [0, 1],
    [1, 0],
    [1, -1],
    [b"", 9],
]


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_answer_that_is_none_acknowledges_nothing(client: redis.Redis, answer: object) -> None:
    client.set_response_callback("WAITAOF", lambda *_, **__: answer)

    assert not ReplicaWait(client, ONE).confirm()
    assert ReplicaWait(client, ONE).run(client.register_script(WRITES), ["kms:a"], ["b"])[1] is False


def test_replicas_that_no_server_has_are_refused(client: redis.Redis) -> None:
    client.set_response_callback("WAITAOF", lambda *_, **__: [1, 3])

    with pytest.raises(
        ConfigurationError, match="Redis says that 3 replicas have a write, and that 0 follow it"
    ):
        check_answers(client, 1)


def test_cluster_is_refused() -> None:
    url = "redis+cluster://127.0.0.1:1"

    with pytest.raises(ConfigurationError, match="a Redis Cluster cannot be waited for"):
        verify_replicas(RedisSection(url=url, broker_url="amqp://127.0.0.1", wait_replicas=1))


def test_replicas_that_are_away_are_no_reason_to_refuse(client: redis.Redis) -> None:
    check_answers(client, 1)


@pytest.mark.parametrize(
    "line", ["wait_replicas = -1", "wait_replicas = 17", "wait_ms = 0", "wait_ms = 60_001"]
)
def test_settings_out_of_bounds_are_refused(tmp_path_factory: pytest.TempPathFactory, line: str) -> None:
    file = tmp_path_factory.mktemp("settings") / "kms.toml"
    file.write_text(f"[kms]\n[kms.redis]\n{line}\n")

    with pytest.raises(ConfigurationError, match=line.partition(" ")[0]):
        load(file, {"HOME": "/nonexistent"})

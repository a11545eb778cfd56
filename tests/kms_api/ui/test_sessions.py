"""Sessions of the pages: how long they last, whose make room for whose, and what Redis tells of them."""

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import pytest
import redis

from kms_api.ui.sessions import (
    COOKIE,
    LASTS_S,
    MOST_OF_CREDENTIAL,
    MOST_OF_TENANT,
    Sessions,
    cookies,
)
from kms_core.auth.policy import Grant, Principal
from kms_core.jobs.model import RecordKey
from kms_protocol.errors import Unavailable
from support.clock import Clock
from support.job_stores import connect
from support.redis_servers import Server, server
from support.waiting import RealTime

Client = Any
"""A ``redis.Redis``, whose annotations cover asynchronous clients too."""
KEY: Final = RecordKey((b"k" * 32,))
ADA: Final = Principal("ada.lovelace", "acme", "token:ada")
EVE: Final = Principal("eve", "acme", "token:eve")
OTHER: Final = Principal("ada.lovelace", "beta", "token:other")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("redis") / "own", None, appends=False) as started:
        yield started


@pytest.fixture
def admin(running: Server) -> Client:
    """An administrator of an empty Redis, who may read all of it."""
    client = running.admin()
    client.flushdb()
    return client


@pytest.fixture
def client(running: Server) -> redis.Redis:
    """The service's own client, with its rights only."""
    return connect(running.url())


@pytest.fixture
def sessions(client: redis.Redis, clock: Clock, admin: redis.Redis) -> Sessions:
    del admin
    return Sessions(client, KEY, clock)


def records(admin: redis.Redis) -> list[str]:
    """The keys of the sealed records."""
    return [key.decode() for key in admin.scan_iter("kms:session:*")]


def indexes(admin: redis.Redis) -> list[str]:
    """The keys of the lists of tenants."""
    return [key.decode() for key in admin.scan_iter("kms:sessions:*")]


def test_a_session_ends_after_eight_hours(sessions: Sessions, admin: Client, clock: Clock) -> None:
    first = sessions.begin(ADA)
    assert sessions.find(first) == ADA
    clock.now += LASTS_S - 0.001
    assert sessions.find(first) == ADA
    clock.now = 1000.0 + LASTS_S
    assert sessions.find(first) is None

    for key in (*records(admin), *indexes(admin)):
        assert LASTS_S - 60 < admin.ttl(key) <= LASTS_S, "Redis removes it then"


def test_expired_sessions_take_no_room(sessions: Sessions, admin: Client) -> None:
    sessions.begin(ADA)
    (index,) = indexes(admin)
    (member,) = admin.zrange(index, 0, -1)
    admin.zincrby(index, -LASTS_S - 1, member)

    sessions.begin(EVE)
    assert member not in admin.zrange(index, 0, -1)
    assert admin.zcard(index) == 1


def test_a_session_that_was_ended_is_none(sessions: Sessions, admin: Client) -> None:
    one, other = sessions.begin(ADA), sessions.begin(ADA)
    sessions.end(one, ADA)

    assert (sessions.find(one), sessions.find(other)) == (None, ADA)
    assert (len(records(admin)), admin.zcard(indexes(admin)[0])) == (1, 1)


def test_sessions_of_one_process_are_found_by_others(sessions: Sessions, running: Server) -> None:
    """Also the stamps of forms, so that any process can answer any request."""
    beside = Sessions(connect(running.url()), RecordKey((b"k" * 32,)), lambda: 1000.0)
    session = sessions.begin(ADA)

    assert beside.find(session) == ADA
    assert beside.is_stamp("session x", sessions.stamp("session x"))
    assert not beside.is_stamp("session y", sessions.stamp("session x"))
    beside.end(session, ADA)
    assert sessions.find(session) is None


def test_a_session_outlives_the_rotation_of_the_spool_key(sessions: Sessions, client: redis.Redis) -> None:
    session = sessions.begin(ADA)
    rotated = Sessions(client, RecordKey((b"k" * 32, b"n" * 32)), lambda: 1000.0)

    assert rotated.find(session) == ADA
    assert rotated.is_stamp("session x", sessions.stamp("session x"))
    assert Sessions(client, RecordKey((b"n" * 32,)), lambda: 1000.0).find(session) is None


def test_logins_of_one_credential_end_no_session_of_another(sessions: Sessions, admin: Client) -> None:
    colleague, stranger = sessions.begin(ADA), sessions.begin(OTHER)
    made = [sessions.begin(EVE) for _ in range(205)]

    assert sessions.find(colleague) == ADA
    assert sessions.find(stranger) == OTHER
    assert [sessions.find(one) for one in made[:-50]] == [None] * 155
    assert [sessions.find(one) for one in made[-50:]] == [EVE] * 50
    assert len(records(admin)) == 52


def test_jwts_of_one_holder_are_one_credential(sessions: Sessions) -> None:
    colleague = sessions.begin(ADA)
    for number in range(105):
        sessions.begin(Principal("corp:eve", "acme", f"jwt:corp:{number:016x}", Grant(("*",), 9e9)))

    assert sessions.find(colleague) == ADA


def test_in_a_full_tenant_the_oldest_of_the_same_credential_ends_first(
    sessions: Sessions, admin: Client
) -> None:
    stranger, eldest, mine = sessions.begin(OTHER), sessions.begin(EVE), sessions.begin(ADA)
    for number in range(MOST_OF_TENANT - 2):
        sessions.begin(Principal(f"bot-{number // MOST_OF_CREDENTIAL}", "acme", f"token:{number}"))
    assert len(records(admin)) == MOST_OF_TENANT + 1

    following = sessions.begin(ADA)
    assert (sessions.find(mine), sessions.find(eldest), sessions.find(following)) == (None, EVE, ADA)

    sessions.begin(Principal("new", "acme", "token:new"))
    assert (sessions.find(eldest), sessions.find(following)) == (None, ADA)
    assert sessions.find(stranger) == OTHER
    assert len(records(admin)) == MOST_OF_TENANT + 1


def test_redis_tells_no_session_and_not_whose_it_is(
    sessions: Sessions, client: redis.Redis, admin: Client
) -> None:
    """Read access to Redis logs in as no one: the cookie is nowhere in it, nor a name."""
    who = Principal("canary-otto", "canary-tenant", "token:canary-id", Grant(("canary-scope",), 9e9))
    session = sessions.begin(who)

    held = b"".join(key + (admin.dump(key) or b"") for key in admin.scan_iter("*"))
    assert session.encode() not in held
    assert b"canary" not in held
    assert hashlib.sha256(session.encode()).hexdigest().encode() in held
    assert sessions.find(hashlib.sha256(session.encode()).hexdigest()) is None
    strange = Sessions(client, RecordKey((b"x" * 32,)), lambda: 1000.0)
    strange.begin(who)
    assert len(indexes(admin)) == 2, "labels of tenants differ from install to install"


def test_write_access_to_redis_makes_no_session(sessions: Sessions, admin: Client) -> None:
    """A record opens under its own name only, and only as what this service has sealed."""
    mine, theirs = sessions.begin(EVE), sessions.begin(ADA)
    names = [f"kms:session:{hashlib.sha256(one.encode()).hexdigest()}" for one in (mine, theirs)]
    own, other = (admin.get(name) for name in names)
    assert own
    assert other

    for forged in (other, KEY.seal_as(b"kms-service/other/1", names[0][12:].encode(), b"x"), own[:-1], b""):
        admin.set(names[0], forged)
        assert sessions.find(mine) is None
    admin.set(names[0], own)
    assert sessions.find(mine) == EVE


def test_without_redis_there_is_no_session_and_no_refusal() -> None:
    sessions = Sessions(connect("unix:///nonexistent/valkey.sock"), KEY)

    for call in (
        lambda: sessions.begin(ADA),
        lambda: sessions.find("a" * 43),
        lambda: sessions.end("a" * 43, ADA),
    ):
        with pytest.raises(Unavailable, match="Redis"):
            call()


@pytest.mark.parametrize("session", ["", "x", "a" * 42, "a" * 44, "\0" * 43, "é" * 43, "x" * 8000])
def test_what_is_no_session_is_none_and_asks_no_redis(session: str) -> None:
    assert Sessions(connect("unix:///nonexistent/valkey.sock"), KEY).find(session) is None


# -- cookies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("kms_session=abc", "abc"),
        ("a=b; kms_session=abc; c=d", "abc"),
        ("a=b;kms_session=abc", "abc"),
        ("kms_session=one; kms_session=two", "one"),
        ("my_kms_session=abc; kms_sessions=x", ""),
        ("kms_session", ""),
        ("kms_session=", ""),
        ('kms_session="abc"', '"abc"'),
        ("", ""),
    ],
)
def test_a_cookie_is_what_its_name_says(header: str, value: str) -> None:
    headers = [(b"host", b"kms_session=no"), (b"cookie", header.encode()), (b"cookie", b"d=e")]

    assert next(cookies(headers, COOKIE), "") == value


def test_all_values_of_a_cookie_are_found() -> None:
    headers = [(b"cookie", b"kms_session=one; a=b;kms_session=two"), (b"cookie", b"kms_session=three")]

    assert list(cookies(headers, COOKIE)) == ["one", "two", "three"]


def test_no_cookie_takes_long_to_read() -> None:
    """``http.cookies`` of Python 3.11.7 takes a minute for the last of these."""
    seconds = []
    for size in (600, 6_000, 60_000):
        headers = [(b"cookie", b'a="' + b"\\\\" * (size // 2) + b'"; kms_session="' + b"\\1" * (size // 2))]
        begun = RealTime.processor_s()
        for _ in range(50):
            next(cookies(headers, COOKIE), "")
        seconds.append((RealTime.processor_s() - begun) / 50)
        assert seconds[-1] <= max(seconds[0], 1e-5) * size / 600 * 3, seconds

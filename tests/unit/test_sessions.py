"""Sessions of the page: how long they last, whose make room for whose, and what their files tell."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from disksteps import recorded
from kms_api.transport.sessions import (
    COOKIE,
    LASTS_S,
    MOST_OF_CREDENTIAL,
    MOST_OF_TENANT,
    Sessions,
    cookie,
    cookies,
)
from kms_core.auth.policy import Principal

ADA: Final = Principal("ada.lovelace", "acme", "token:ada")  # none of which text in hexadecimal contains
EVE: Final = Principal("eve", "acme", "token:eve")
OTHER: Final = Principal("ada.lovelace", "beta", "token:other")


class Clock:
    """Seconds since the epoch; each look is a second later."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(tmp_path: Path, clock: Clock) -> Sessions:
    return Sessions(tmp_path / "sessions", clock)


def files(tmp_path: Path) -> Iterator[Path]:
    found = (tmp_path / "sessions").rglob("*")
    return (path for path in found if path.is_file() and path.name != "stamping")


def test_a_session_ends_after_eight_hours(sessions: Sessions, clock: Clock, tmp_path: Path) -> None:
    first = sessions.begin(ADA)
    began = clock.now
    assert sessions.find(first) == ADA
    clock.now = began + LASTS_S - 10
    assert sessions.find(first) == ADA
    clock.now = began + LASTS_S
    assert sessions.find(first) is None

    sessions.begin(OTHER)
    assert len(list(files(tmp_path))) == 1, "what has run out is removed, whosever it was"


def test_a_session_ends_with_its_last_second(tmp_path: Path) -> None:
    now = 1000.0
    sessions = Sessions(tmp_path / "sessions", lambda: now)
    first = sessions.begin(ADA)

    now += LASTS_S - 0.001
    assert sessions.find(first) == ADA
    now = 1000.0 + LASTS_S
    assert sessions.find(first) is None
    sessions.begin(ADA)
    assert len(list(files(tmp_path))) == 1, "the one that has just ended is removed"


def test_a_session_that_was_ended_is_none(sessions: Sessions) -> None:
    one, other = sessions.begin(ADA), sessions.begin(ADA)
    sessions.end(one)

    assert (sessions.find(one), sessions.find(other)) == (None, ADA)


def test_logins_of_one_credential_end_no_session_of_another(sessions: Sessions, tmp_path: Path) -> None:
    colleague, stranger = sessions.begin(ADA), sessions.begin(OTHER)
    made = [sessions.begin(EVE) for _ in range(1005)]

    assert sessions.find(colleague) == ADA
    assert sessions.find(stranger) == OTHER
    assert [sessions.find(one) for one in made[:-50]] == [None] * 955
    assert [sessions.find(one) for one in made[-50:]] == [EVE] * 50
    assert len(list(files(tmp_path))) == 52


def test_a_login_looks_at_no_session_of_another_tenant(
    sessions: Sessions, tmp_path: Path, clock: Clock
) -> None:
    """Or each would take the longer, the more have logged in anywhere; once an hour one looks at all."""
    sessions.begin(OTHER)
    (theirs,) = files(tmp_path)
    os.utime(theirs, (0, 0))  # expired long ago: a login that came upon it would remove it
    clock.now = LASTS_S + 1000
    beside = Sessions(tmp_path / "sessions", clock)
    beside.begin(ADA)
    assert not theirs.exists()

    beside.begin(OTHER)
    (other,) = theirs.parent.iterdir()
    os.utime(other, (0, 0))
    beside.begin(ADA)
    assert other.exists()
    clock.now += 3600
    beside.begin(ADA)
    assert not other.exists()


def test_sessions_of_an_earlier_version_last_until_they_expire(tmp_path: Path, clock: Clock) -> None:
    """Their files lie beside the folders of tenants, named by the digest of the cookie."""
    session, folder = "A" * 43, tmp_path / "sessions"
    folder.mkdir()
    old = folder / hashlib.sha256(session.encode()).hexdigest()
    who = {"name": ADA.name, "tenant": ADA.tenant, "credential": ADA.credential}
    old.write_text(json.dumps({"who": who, "until": LASTS_S + 1000}))
    os.utime(old, (1000, 1000))
    sessions = Sessions(folder, clock)
    sessions.begin(ADA)

    assert sessions.find(session) == ADA
    clock.now = LASTS_S + 2000
    assert sessions.find(session) is None
    sessions.begin(OTHER)
    assert not old.exists()


def test_jwts_of_one_holder_are_one_credential(sessions: Sessions) -> None:
    colleague = sessions.begin(ADA)
    for number in range(1005):
        sessions.begin(Principal("corp:eve", "acme", f"jwt:corp:{number:016x}"))

    assert sessions.find(colleague) == ADA


def test_in_a_full_tenant_the_oldest_of_the_same_credential_ends_first(
    sessions: Sessions, tmp_path: Path
) -> None:
    stranger, eldest, mine = sessions.begin(OTHER), sessions.begin(EVE), sessions.begin(ADA)
    for number in range(MOST_OF_TENANT - 2):
        sessions.begin(Principal(f"bot-{number // MOST_OF_CREDENTIAL}", "acme", f"token:{number}"))
    assert len(list(files(tmp_path))) == MOST_OF_TENANT + 1

    following = sessions.begin(ADA)
    assert (sessions.find(mine), sessions.find(eldest), sessions.find(following)) == (None, EVE, ADA)

    sessions.begin(Principal("new", "acme", "token:new"))
    assert (sessions.find(eldest), sessions.find(following)) == (None, ADA)
    assert sessions.find(stranger) == OTHER
    assert len(list(files(tmp_path))) == MOST_OF_TENANT + 1


def test_no_file_tells_a_session_or_whose_it_is(sessions: Sessions, tmp_path: Path) -> None:
    """Who reads the folder can log in as no one: the id that a cookie holds is nowhere in it."""
    who = Principal("otto", "acme", "token:otto")  # hexadecimal digits may spell "ada"
    session = sessions.begin(who)
    (path,) = files(tmp_path)

    secret = session[-43:]  # 256 bits in base64
    assert secret not in path.name
    assert secret.encode() not in path.read_bytes()
    names = (who.name, who.tenant, who.credential)
    assert not [name for name in names if name in path.name or name in path.parent.name]
    assert sessions.find(path.name) is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_names_of_files_differ_from_install_to_install(tmp_path: Path) -> None:
    one, other = (Sessions(tmp_path / name).begin(ADA)[:32] for name in ("one", "other"))

    assert one != other


@pytest.mark.parametrize(
    "session",
    ["", "x", "../stamping", "a" * 32, f"{'a' * 32}/../stamping", "\0" * 43, "é" * 75, "x" * 8000],
)
def test_what_is_no_session_is_none(sessions: Sessions, session: str) -> None:
    sessions.begin(ADA)

    assert sessions.find(session) is None
    sessions.end(session)


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

    assert cookie(headers, COOKIE) == value


def test_all_values_of_a_cookie_are_found() -> None:
    headers = [(b"cookie", b"kms_session=one; a=b;kms_session=two"), (b"cookie", b"kms_session=three")]

    assert list(cookies(headers, COOKIE)) == ["one", "two", "three"]


def test_no_cookie_takes_long_to_read() -> None:
    """``http.cookies`` of Python 3.11.7 takes a minute for the last of these."""
    seconds = []
    for size in (600, 6_000, 60_000):
        headers = [(b"cookie", b'a="' + b"\\\\" * (size // 2) + b'"; kms_session="' + b"\\1" * (size // 2))]
        begun = time.process_time()
        for _ in range(50):
            cookie(headers, COOKIE)
        seconds.append((time.process_time() - begun) / 50)
        assert seconds[-1] <= max(seconds[0], 1e-5) * size / 600 * 3, seconds


def test_the_key_of_sessions_is_whole_before_others_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty or short key after a power cut would be one that everybody knows."""
    disk = recorded(monkeypatch)
    Sessions(tmp_path / "sessions")
    stamping = tmp_path / "sessions" / "stamping"

    assert disk.synced_bytes[stamping.stat().st_ino] == stamping.stat().st_size == 32

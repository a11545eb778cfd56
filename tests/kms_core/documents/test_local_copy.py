"""The copy of a document on a host: who asks the storage, how old it may be, and when it is read again."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.local_copy import CopyPoll, LocalCopy
from kms_protocol.errors import Unavailable
from support.clock import Clock
from support.documents import FaultyStorage
from support.job_stores import connect
from support.waiting import WAIT_S, RealTime, until

KEY: Final = b"d" * 32


class Host:
    """A host with a document and its copy, as one of its processes sees it."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.folder, self.clock = folder, Clock(time.time())
        self.storage = FaultyStorage(folder / "shared")
        self.document = SignedDocument(
            "tokens", self.storage, KEY, Anchors("tokens", folder / "state", connect(redis_url), KEY)
        )
        self.copy = self.process()

    def process(self) -> LocalCopy:
        return LocalCopy(self.document, self.folder / "state", 60, self.clock)

    def write(self, body: bytes) -> None:
        self.document.write(self.document.read(), lambda _: body)
        self.storage.asked = 0


@pytest.fixture
def host(tmp_path: Path, redis_url: str) -> Host:
    """Its document is [1], and no process has read it."""
    made = Host(tmp_path, redis_url)
    made.write(b"[1]")
    return made


def test_nothing_is_known_before_the_first_answer(tmp_path: Path, redis_url: str) -> None:
    host = Host(tmp_path, redis_url)
    with pytest.raises(Unavailable, match="not read yet"):
        host.copy.current()
    host.storage.is_away = True
    with pytest.raises(Unavailable):
        host.copy.poll()
    with pytest.raises(Unavailable):
        host.copy.current()

    host.storage.is_away = False
    host.copy.poll()
    assert host.copy.current().body == b""


def test_processes_of_a_host_ask_once_a_second(host: Host) -> None:
    processes = [host.process() for _ in range(5)]
    for _ in range(10):
        for process in processes:
            process.poll()
        host.clock.now += 1
    assert host.storage.asked == 10
    assert [process.current().body for process in processes] == [b"[1]"] * 5


def test_a_change_is_seen_by_all_processes_after_one_asked(host: Host) -> None:
    other = host.process()
    host.copy.poll()
    assert other.current().body == b"[1]"
    host.write(b"[2]")
    assert other.current().body == b"[1]"
    host.clock.now += 1
    host.copy.poll()
    assert other.current().body == b"[2]"


def test_a_copy_with_the_inode_and_the_size_of_the_one_before_is_seen(host: Host, tmp_path: Path) -> None:
    """Inodes are used again: written in place of the old one, it looks the same but for its times."""
    for _ in range(18):  # write ids of that many versions are kept: the next one is as long
        host.write(b"[1]")
    host.copy.poll()
    assert host.copy.current().body == b"[1]"
    host.write(b"[2]")
    LocalCopy(host.document, tmp_path / "other", 60, host.clock).poll()
    path = host.folder / "state/tokens.copy"
    before = path.stat()
    path.write_bytes((tmp_path / "other/tokens.copy").read_bytes())
    os.utime(path, (host.clock.now + 1, host.clock.now + 1))
    after = path.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)

    assert host.copy.current().body == b"[2]"


@pytest.mark.parametrize(
    ("age_s", "fits"), [(0, True), (59.9, True), (60.1, False), (-1.5, True), (-3, False)]
)
def test_a_copy_is_used_for_so_long_without_an_answer(host: Host, age_s: float, *, fits: bool) -> None:
    """A clock that was set back makes it too old, not too young."""
    host.copy.poll()
    host.storage.is_away = True
    host.clock.now += age_s

    if fits:
        assert host.copy.current().body == b"[1]"
    else:
        with pytest.raises(Unavailable, match="too long"):
            host.copy.current()
    host.storage.is_away = False
    host.copy.reread()
    assert host.copy.current().body == b"[1]"


def test_an_answer_counts_from_when_it_was_asked_for(host: Host) -> None:
    def slow() -> None:
        host.clock.now += 30

    host.storage.before_read = slow
    host.copy.poll()
    host.storage.before_read = lambda: None
    host.clock.now += 31
    with pytest.raises(Unavailable):
        host.copy.current()


def test_callers_that_wait_share_an_answer_that_was_asked_for_after_they_came(host: Host) -> None:
    host.storage.before_read = lambda: RealTime.sleep(0.3)
    with ThreadPoolExecutor(10) as threads:
        for call in [threads.submit(host.copy.reread) for _ in range(10)]:
            call.result(WAIT_S)

    assert host.storage.asked <= 2
    host.write(b"[2]")
    begun = RealTime.now_s()
    host.copy.reread()
    assert host.copy.current().body == b"[2]", "an answer from before it came is none"
    assert RealTime.now_s() - begun < 3


def test_a_failure_is_shared_too(host: Host) -> None:
    """A token that could not be looked for is not unknown."""
    host.storage.is_away = True
    host.storage.before_read = lambda: RealTime.sleep(0.3)
    with ThreadPoolExecutor(5) as threads:
        calls = [threads.submit(host.copy.reread) for _ in range(5)]

    assert {type(call.exception(WAIT_S)) for call in calls} == {Unavailable}


def test_a_damaged_copy_is_replaced(host: Host) -> None:
    host.copy.poll()
    path = host.folder / "state/tokens.copy"
    for content in (b"", b"junk", path.read_bytes().replace(b"[1]", b"[9]")):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(Unavailable):
            host.process().current()
        host.process().reread()
        assert host.process().current().body == b"[1]"


def test_a_poll_goes_on_while_the_storage_is_away(host: Host) -> None:
    copy = LocalCopy(host.document, host.folder / "state", 60)
    poll = CopyPoll(copy)
    host.storage.is_away = True
    poll.start()
    try:
        until(lambda: host.storage.asked > 1, "it asks again")
        host.storage.is_away = False
        until((host.folder / "state/tokens.copy").exists, "it has an answer")
        assert copy.current().body == b"[1]"
    finally:
        poll.stop(5)


def test_a_copy_that_cannot_be_written_is_unavailable_and_no_crash(host: Host) -> None:
    """As on a full disk."""
    (host.folder / "state" / "tokens.copy").mkdir(parents=True)

    with pytest.raises(Unavailable):
        host.copy.reread()

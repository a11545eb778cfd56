"""Age keys in signed documents: what hosts read, when a new version is used, and what is refused."""

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, cast

import msgspec
import pytest

from kms_core import stores
from kms_core.age import x25519
from kms_core.age.header import Stanza
from kms_core.age.x25519 import NoMatch
from kms_core.backends.age import RECHECK_S, AgeBackend
from kms_core.documents.anchors import Anchors
from kms_core.documents.document import SignedDocument
from kms_core.documents.key_document import PUBLISH_S, KeyBody, KeyDocument
from kms_core.documents.local_copy import POLL_S, LocalCopy
from kms_core.envelope.binding import KeyRef, version_of
from kms_core.envelope.sealed_files import NotOpenedYet
from kms_core.http_client import Unreachable
from kms_core.opened_files import LOOK_S, InheritedFiles, KeyOpener
from kms_core.secure_memory import SharedSecrets
from kms_protocol.errors import (
    BackendUnavailable,
    ConfigurationError,
    DocumentOutdated,
    TooManyVersions,
    Unavailable,
)
from support.documents import FaultySealer, FaultyStorage
from support.job_stores import connect
from support.service import Service

KEY: Final = b"d" * 32
NAME: Final = "orders"
YEAR_S: Final = 365 * 24 * 3600.0
AAD: Final = b"aad"


class Host:
    """A host with a state directory of its own: the process that opens keys, and one that uses them."""

    def __init__(
        self, folder: Path, storage: FaultyStorage, redis_url: str, root: FaultySealer, name: str = NAME
    ) -> None:
        self.folder = folder
        anchors = Anchors(f"key-{name}", folder, connect(redis_url), KEY, f"kms keys adopt {name}")
        self.document = SignedDocument(f"key-{name}", storage, KEY, anchors)
        self.copy = LocalCopy(self.document, folder, math.inf)
        memory = SharedSecrets.create()
        self.source = KeyDocument(name, self.document, self.copy, root, InheritedFiles(memory, root))
        self.opener = KeyOpener({}, root, memory, look_s=0.01)
        self.opener.add(name, self.source.private, self.source.sealed)

    def backend(self) -> AgeBackend:
        return AgeBackend(self.source, recheck_s=0)

    def follow(self) -> None:
        """Read what changed, and open it."""
        self.copy.reread()
        self.opener.round()

    def asked(self, seconds: float) -> None:
        """Let the last answer of the store be so many seconds ago."""
        at = time.time() - seconds
        os.utime(self.folder / f"{self.document.name}.copy", (at, at))


@pytest.fixture(autouse=True)
def _no_publish_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for hosts that it does not have."""
    monkeypatch.setattr(KeyDocument, "publish_s", 0.0)


@pytest.fixture
def storage(tmp_path: Path) -> FaultyStorage:
    return FaultyStorage(tmp_path / "shared" / "document")


@pytest.fixture
def root(tmp_path: Path) -> FaultySealer:
    return FaultySealer(tmp_path / "root")


@pytest.fixture
def first() -> x25519.X25519Identity:
    return x25519.X25519Identity.generate()


@pytest.fixture
def host_of(
    tmp_path: Path, storage: FaultyStorage, redis_url: str, root: FaultySealer
) -> Callable[[str], Host]:
    """A host by its name, with the shared storage."""
    return lambda name: Host(tmp_path / name, storage, redis_url, root)


@pytest.fixture
def hosts(host_of: Callable[[str], Host], first: x25519.X25519Identity) -> Iterator[tuple[Host, Host]]:
    one, two = host_of("one"), host_of("two")
    assert one.source.make(f"{first.export()}\n".encode(), "root")
    for host in (one, two):
        host.follow()
        host.opener.start()
    yield one, two
    for host in (one, two):
        host.opener.stop()


def ref(backend: AgeBackend, version: str = "") -> KeyRef:
    return KeyRef("acme", NAME, version or backend.versions()[-1].version, "age")


def sealed_by(backend: AgeBackend) -> tuple[Stanza, KeyRef]:
    key = ref(backend)
    return backend.wrap(bytes(16), key, AAD), key


def versions(backend: AgeBackend) -> set[str]:
    return {version.version for version in backend.versions()}


def test_a_version_made_on_one_host_seals_and_opens_on_all(
    hosts: tuple[Host, Host], first: x25519.X25519Identity
) -> None:
    one, two = hosts
    ours, theirs = one.backend(), two.backend()
    old = sealed_by(theirs)
    made = ours.rotate()
    two.follow()

    assert ours.versions()[-1].version == theirs.versions()[-1].version == made.version
    assert versions(theirs) == {version_of(first.recipient), made.version}
    for sealer, opener in ((ours, theirs), (theirs, ours)):
        stanza, key = sealed_by(sealer)
        assert opener.unwrap(stanza, key, AAD) == bytes(16)
    assert ours.unwrap(*old, AAD) == bytes(16)


def test_a_version_is_open_on_all_hosts_before_it_seals(
    hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hosts have read it while the host that made it waits, and seal with the old one."""
    one, two = hosts
    ours, theirs = one.backend(), two.backend()
    before, seen = theirs.versions()[-1].version, list[set[str]]()
    genuine = KeyDocument.use

    def use(source: KeyDocument, recipient: str) -> None:
        two.follow()
        assert theirs.versions()[-1].version == ours.versions()[-1].version == before
        seen.append(versions(theirs))
        genuine(source, recipient)

    monkeypatch.setattr(KeyDocument, "use", use)
    made = ours.rotate()

    assert seen == [{before, made.version}]


def test_a_rotation_waits_for_twice_the_time_in_which_hosts_read_a_change(
    hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll is late by half its interval at most, where two processes of a host take turns."""
    waits = list[float]()
    monkeypatch.setattr(KeyDocument, "publish_s", PUBLISH_S)
    monkeypatch.setattr("kms_core.backends.age.time.sleep", waits.append)
    hosts[0].backend().rotate()

    assert PUBLISH_S in waits
    assert PUBLISH_S >= 2 * (1.5 * POLL_S + LOOK_S + RECHECK_S)


def test_two_hosts_that_rotate_at_once_lose_no_version(
    hosts: tuple[Host, Host], storage: FaultyStorage, first: x25519.X25519Identity
) -> None:
    one, two = hosts
    ours, theirs = one.backend(), two.backend()
    with ThreadPoolExecutor(1) as pool:
        storage.before_write = lambda: pool.submit(theirs.rotate).result(30)
        made = ours.rotate()
    two.follow()

    found = versions(theirs)
    assert len(found) == 3
    assert found > {version_of(first.recipient), made.version}
    assert versions(ours) == found
    assert theirs.versions()[-1].version == ours.versions()[-1].version


def test_no_rotation_makes_more_identities_than_processes_share(
    host_of: Callable[[str], Host], storage: FaultyStorage, first: x25519.X25519Identity
) -> None:
    """Those of all keys are in memory of a fixed size."""
    host = host_of("one")
    assert host.source.make(b"#" * 2**19 + f"\n{first.export()}\n".encode(), "root")
    host.follow()
    before = storage.path.read_bytes()

    with pytest.raises(TooManyVersions):
        host.backend().rotate()
    assert storage.path.read_bytes() == before


def test_a_root_that_is_away_at_a_rotation_changes_nothing(
    hosts: tuple[Host, Host], storage: FaultyStorage, root: FaultySealer
) -> None:
    backend = hosts[0].backend()
    before, version = storage.path.read_bytes(), backend.versions()[-1].version
    root.trouble = BackendUnavailable("the root is away")

    with pytest.raises(BackendUnavailable, match="the root is away"):
        backend.rotate()
    assert storage.path.read_bytes() == before
    assert backend.versions()[-1].version == version
    assert backend.health_check().healthy


def test_a_store_that_is_away_stops_rotations_and_nothing_else(
    hosts: tuple[Host, Host], storage: FaultyStorage
) -> None:
    one, _ = hosts
    backend = one.backend()
    storage.is_away = True
    one.asked(YEAR_S)

    assert one.source.is_late
    assert backend.health_check().healthy
    assert backend.unwrap(*sealed_by(backend), AAD) == bytes(16)
    with pytest.raises(BackendUnavailable, match="the store is away"):
        backend.rotate()
    storage.is_away = False
    one.copy.poll()
    assert not one.source.is_late


@pytest.mark.parametrize("age_s", [YEAR_S, -YEAR_S], ids=["old", "of a clock that was ahead"])
def test_a_start_without_the_store_uses_the_copy(
    hosts: tuple[Host, Host], host_of: Callable[[str], Host], storage: FaultyStorage, age_s: float
) -> None:
    one, _ = hosts
    stanza, key = sealed_by(one.backend())
    storage.is_away = True
    one.asked(age_s)
    started = host_of("one")
    started.opener.round()
    assert started.backend().unwrap(stanza, key, AAD) == bytes(16)

    new = host_of("new")
    backend = new.backend()
    for call in (backend.versions, partial(backend.unwrap, stanza, key, AAD)):
        with pytest.raises(BackendUnavailable, match=str(storage)):
            call()
    assert not backend.health_check().healthy
    storage.is_away = False
    new.follow()
    assert backend.unwrap(stanza, key, AAD) == bytes(16)
    assert backend.health_check().healthy


def test_an_old_document_is_refused_and_adopted_with_every_version(
    hosts: tuple[Host, Host], storage: FaultyStorage
) -> None:
    one, two = hosts
    old = storage.path.read_bytes()
    backend = one.backend()
    made = backend.rotate()
    storage.path.write_bytes(old)

    for host in hosts:
        with pytest.raises(Unavailable):
            host.copy.reread()
    with pytest.raises(DocumentOutdated, match=f"kms keys adopt {NAME}"):
        one.document.read()
    assert backend.versions()[-1].version == made.version
    with pytest.raises(BackendUnavailable, match="generation"):
        backend.rotate()

    assert one.source.adopt([]) == 2
    two.follow()
    assert two.backend().versions()[-1].version == made.version


def test_the_document_of_another_key_is_refused(
    hosts: tuple[Host, Host], tmp_path: Path, storage: FaultyStorage, redis_url: str, root: FaultySealer
) -> None:
    """Also its content, in a document that is signed for this key."""
    one, _ = hosts
    backend = one.backend()
    version = backend.versions()[-1].version
    other = Host(tmp_path / "other", FaultyStorage(tmp_path / "elsewhere"), redis_url, root, "invoices")
    other.source.make(f"{x25519.X25519Identity.generate().export()}\n".encode(), "root")
    storage.path.write_bytes((tmp_path / "elsewhere").read_bytes())

    with pytest.raises(ConfigurationError, match="another document, key-invoices and not key-orders"):
        one.document.read()
    with pytest.raises(Unavailable):
        one.copy.reread()
    assert backend.versions()[-1].version == version

    body = other.document.read().body
    storage.path.unlink()
    one.document.adopt(lambda _: body)
    one.follow()
    assert backend.versions()[-1].version == version
    assert "was not sealed as orders" in backend.health_check().detail


def test_the_anchor_of_another_key_counts_as_none(tmp_path: Path, redis_url: str) -> None:
    """Others may copy it: a higher generation would stop rotations, a lower one let an old document pass."""
    settings, client = Service(tmp_path, "", redis_url).settings, connect(redis_url)
    orders, bills = (
        stores.key_document(settings, KEY, name, f"file://{tmp_path}/{name}") for name in (NAME, "bills")
    )
    for _ in range(2):
        orders.write(orders.read(), lambda _: b"{}")
    made = bills.write(bills.read(), lambda _: b"{}")
    client.set("kms:document:key-bills", cast("bytes", client.get(f"kms:document:key-{NAME}")))

    assert bills.read() == made


def test_the_url_of_a_document_is_decoded_once(tmp_path: Path, redis_url: str) -> None:
    """As that of a job's file, and of a key file."""
    settings, url = Service(tmp_path, "", redis_url).settings, f"file://{tmp_path}/of%20orders%2520/ö+"
    document = stores.key_document(settings, KEY, NAME, url)
    document.write(document.read(), lambda _: b"{}")

    assert (tmp_path / "of orders%20" / "ö+").is_file()


@pytest.mark.parametrize("content", [b"", b"# empty\n"], ids=["an identity", "a comment"])
def test_a_document_with_a_plain_key_is_refused(
    tmp_path: Path, storage: FaultyStorage, redis_url: str, root: FaultySealer, content: bytes
) -> None:
    host = Host(tmp_path / "one", storage, redis_url, root)
    identity = x25519.X25519Identity.generate()
    plain = content or f"{identity.export()}\n".encode()
    body = msgspec.json.encode(KeyBody(plain, str(identity.recipient)))
    host.document.write(host.document.read(), lambda _: body)
    host.follow()

    with pytest.raises(ConfigurationError, match="plain key, which no document may hold"):
        host.backend()
    with pytest.raises(ConfigurationError, match="plain key file"):
        Host(tmp_path / "two", FaultyStorage(tmp_path / "new"), redis_url, root).source.adopt([plain])
    assert not (tmp_path / "new").exists()


def test_readers_of_the_store_learn_the_recipient_only(
    hosts: tuple[Host, Host], storage: FaultyStorage, first: x25519.X25519Identity
) -> None:
    hosts[0].backend().rotate()
    stored = storage.path.read_bytes()
    body = msgspec.json.decode(hosts[0].document.read().body)

    assert body.keys() == {"sealed", "recipient"}
    assert b"AGE-SECRET-KEY" not in stored + hosts[0].document.read().body
    assert str(first.recipient).encode() not in stored, "old versions"


def test_an_unknown_version_may_be_new_unless_the_document_was_just_read(hosts: tuple[Host, Host]) -> None:
    one, _ = hosts
    backend = one.backend()
    stanza, _ = sealed_by(backend)
    unknown = ref(backend, "0123abcd")

    one.copy.reread()
    with pytest.raises(NoMatch):
        backend.unwrap(stanza, unknown, AAD)
    one.asked(5.1)
    with pytest.raises(Unreachable, match="was not read for 5 s"):
        backend.unwrap(stanza, unknown, AAD)
    with pytest.raises(NoMatch):
        backend.unwrap(stanza, ref(backend, "no version"), AAD)


def test_a_version_that_is_not_open_here_yet_is_worth_a_retry(hosts: tuple[Host, Host]) -> None:
    """Its root answers the host that made it, and not this one yet."""
    one, two = hosts
    theirs = two.backend()
    two.opener.stop()
    ours = one.backend()
    ours.rotate()
    stanza, key = sealed_by(ours)
    two.copy.reread()
    before = theirs.versions()[-1].version

    with pytest.raises(Unreachable, match="not open on this host yet"):
        theirs.unwrap(stanza, key, AAD)
    assert theirs.versions()[-1].version == before
    two.opener.round()
    theirs._sought = 0.0  # noqa: SLF001 -- a second later
    assert theirs.unwrap(stanza, key, AAD) == bytes(16)


def test_a_missing_document_names_the_command(host_of: Callable[[str], Host], storage: FaultyStorage) -> None:
    host = host_of("one")
    host.follow()

    with pytest.raises(ConfigurationError, match=f"kms keygen --sealed-by KEY --for {NAME} -o '{storage}'"):
        host.backend()


def test_a_first_version_is_made_once(hosts: tuple[Host, Host], storage: FaultyStorage) -> None:
    before = storage.path.read_bytes()
    other = f"{x25519.X25519Identity.generate().export()}\n".encode()

    assert not hosts[1].source.make(other, "root")
    assert storage.path.read_bytes() == before


def test_key_files_are_adopted_and_the_last_identity_is_in_use(
    host_of: Callable[[str], Host], root: FaultySealer
) -> None:
    made = [x25519.X25519Identity.generate() for _ in range(3)]
    texts = [f"# created: 2026-01-0{n}T00:00:00Z\n{each.export()}\n" for n, each in enumerate(made, start=1)]
    files = [
        root.seal(NAME, "".join(texts[:2]).encode(), "root"),
        root.seal(NAME, "".join(texts[1:]).encode(), "root"),
    ]
    host = host_of("one")

    assert host.source.adopt(files) == 3
    host.follow()
    found = host.backend().versions()
    assert [each.version for each in found] == [version_of(each.recipient) for each in made]
    assert [each.created_at and each.created_at.day for each in found] == [1, 2, 3]
    with pytest.raises(ConfigurationError, match="was not sealed as"):
        host.source.adopt([root.seal("invoices", texts[0].encode(), "root")])


def test_a_command_reads_the_document_itself_if_no_service_polls(
    hosts: tuple[Host, Host], tmp_path: Path, storage: FaultyStorage, redis_url: str, root: FaultySealer
) -> None:
    """It changes no anchor and no copy, which belong to the user of the service."""
    version = hosts[0].backend().versions()[-1].version
    folder = tmp_path / "command"
    anchors = Anchors("key-orders", folder, connect(redis_url), KEY)
    document = SignedDocument("key-orders", storage, KEY, anchors)
    source = KeyDocument(NAME, document, LocalCopy(document, folder, math.inf), root)

    assert AgeBackend(source).versions()[-1].version == version
    assert not folder.exists()
    with pytest.raises(NotOpenedYet):
        InheritedFiles(SharedSecrets.create(), root).open(NAME, hosts[0].source.sealed())

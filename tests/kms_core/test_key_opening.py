"""The process that opens sealed key files: when it asks a root, and what the other processes see."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Final

import pyrage
import pytest

from kms_core import key_opening, keyring
from kms_core.age import x25519
from kms_core.envelope.sealed_files import FileSealer, NotOpenedYet
from kms_core.key_opening import KeyOpener
from kms_core.secure_files import in_shell
from kms_core.secure_memory import SharedSecrets
from kms_protocol.errors import BackendUnavailable, ConfigurationError, UnknownKey
from support.age_kms import age_backend, write_identities
from support.clock import Clock
from support.documents import FaultySealer
from support.settings_files import read, refusal

CONTENT: Final = b"AGE-SECRET-KEY-1TEST\n"


@pytest.fixture
def sealer(tmp_path: Path) -> FaultySealer:
    return FaultySealer(tmp_path / "root")


def opener(
    folder: Path, sealer: FileSealer, *names: str, **clock: Callable[[], float]
) -> tuple[KeyOpener, SharedSecrets]:
    memory = SharedSecrets.create()
    paths = {name: folder / name for name in names}
    for name, path in paths.items():
        path.write_bytes(sealer.seal(name, CONTENT + name.encode(), "root"))
    return KeyOpener(paths, sealer, memory, look_s=0.01, **clock), memory


def reader(memory: SharedSecrets, sealer: FileSealer) -> key_opening.InheritedFiles:
    return key_opening.InheritedFiles(memory, sealer)


def test_a_file_is_opened_once_until_it_changes(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, memory = opener(tmp_path, sealer, "a", "b")
    for _ in range(5):
        thread.round()

    assert sealer.calls == ["a", "b"]
    sealed = (tmp_path / "a").read_bytes()
    assert reader(memory, sealer).open("a", sealed) == CONTENT + b"a"

    (tmp_path / "a").write_bytes(sealer.seal("a", b"later", "root"))
    changed = (tmp_path / "a").read_bytes()
    inherited = reader(memory, sealer)
    with pytest.raises(NotOpenedYet):
        inherited.open("a", changed)
    thread.round()
    assert inherited.open("a", changed) == b"later"
    assert sealer.calls == ["a", "b", "a"]
    assert memory.generation() == 2, "nothing is written without a change"


def test_failures_are_retried_ever_more_rarely(tmp_path: Path, sealer: FaultySealer, clock: Clock) -> None:
    thread, memory = opener(tmp_path, sealer, "a", clock=clock)
    sealer.trouble = BackendUnavailable("the root is away")
    for _ in range(600):  # five minutes
        thread.round()
        clock.now += 0.5
    sealed = (tmp_path / "a").read_bytes()

    assert 7 <= len(sealer.calls) <= 15
    with pytest.raises(BackendUnavailable, match="the root is away"):
        reader(memory, sealer).open("a", sealed)

    sealer.trouble = None
    clock.now += 120
    thread.round()
    assert reader(memory, sealer).open("a", sealed) == CONTENT + b"a"


def test_a_new_file_is_not_kept_waiting(tmp_path: Path, sealer: FaultySealer, clock: Clock) -> None:
    thread, memory = opener(tmp_path, sealer, "a", clock=clock)
    sealer.trouble = BackendUnavailable("away")
    for _ in range(8):
        thread.round()
        clock.now += 60
    sealer.trouble = None
    thread.round()
    (tmp_path / "a").write_bytes(sealer.seal("a", b"mended", "root"))
    thread.round()

    assert reader(memory, sealer).open("a", (tmp_path / "a").read_bytes()) == b"mended"


def test_a_refusal_stops_the_start_and_names_the_file(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, _ = opener(tmp_path, sealer, "a", "b")
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())

    with pytest.raises(ConfigurationError) as raised:
        thread.open_all()
    assert str(tmp_path / "a") in raised.value.detail
    assert "was not sealed as a" in raised.value.detail


def test_an_exchanged_file_is_refused_while_running(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, memory = opener(tmp_path, sealer, "a", "b")
    thread.round()
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())
    thread.round()

    with pytest.raises(ConfigurationError, match="was not sealed as a"):
        reader(memory, sealer).open("a", (tmp_path / "b").read_bytes())
    assert reader(memory, sealer).open("b", (tmp_path / "b").read_bytes()) == CONTENT + b"b"


def test_the_start_waits_for_keys_of_the_service_only(
    tmp_path: Path, sealer: FaultySealer, clock: Clock
) -> None:
    sealed = sealer.seal("kms:spool", CONTENT, "root")
    sealer.trouble = BackendUnavailable("away")

    def until_the_third_try() -> float:
        clock.now += 1
        tries = sealer.calls.count("kms:spool")
        sealer.trouble = None if tries >= 3 else sealer.trouble
        return clock.now

    thread, memory = opener(tmp_path, sealer, "a", "kms:spool", clock=until_the_third_try)
    (tmp_path / "kms:spool").write_bytes(sealed)
    thread.open_all()

    assert sealer.calls.count("kms:spool") == 4
    assert reader(memory, sealer).open("kms:spool", sealed) == CONTENT


def test_the_start_does_not_wait_for_other_keys(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, memory = opener(tmp_path, sealer, "a")
    sealer.trouble = BackendUnavailable("away")
    thread.open_all()

    with pytest.raises(BackendUnavailable):
        reader(memory, sealer).open("a", (tmp_path / "a").read_bytes())


def test_no_repr_shows_content(tmp_path: Path, sealer: FaultySealer) -> None:
    thread, _ = opener(tmp_path, sealer, "a")
    thread.round()

    assert "SECRET" not in repr(thread.found)
    assert "SECRET" not in repr(sealer)


# -- the spool key -----------------------------------------------------------------------------------


def test_a_new_install_in_dev_has_one_spool_key_however_many_processes_begin(tmp_path: Path) -> None:
    settings = read(tmp_path, "", {"HOME": str(tmp_path)})
    path, together = settings.kms.jobs.spool_identity_path, Barrier(8)

    def begin(_: int) -> bytes:
        together.wait()
        assert key_opening.begin(settings) is None
        return path.read_bytes()

    with ThreadPoolExecutor(8) as threads:
        (content,) = set(threads.map(begin, range(8)))

    assert pyrage.x25519.Identity.from_str(content.decode().split()[-1])
    assert [each.name for each in path.parent.iterdir()] == ["spool.key"]
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize(
    "text",
    [
        "[kms]\nenvironment = 'prod'\nprod_backend = 'age'\nallow_age_in_prod = true\n",
        "[kms]\nenvironment = 'staging'\n[kms.environments.staging]\nbackend = 'age'\n",
        "[kms.redis]\nurl = 'redis://queue:6379/0'\n",
        "[kms.jobs.spool_bucket]\nurl = 's3://spool/dev'\n",
        "[kms.jobs]\nspool_dir = '{used}'\n",
    ],
    ids=["prod", "staging", "a Redis of several hosts", "a bucket", "a spool in use"],
)
def test_no_host_makes_a_spool_key_of_its_own_where_others_may_have_one(tmp_path: Path, text: str) -> None:
    used = tmp_path / "used"
    (used / "hosts").mkdir(parents=True)
    settings = read(tmp_path, text.format(used=used), {"HOME": str(tmp_path)})
    path = settings.kms.jobs.spool_identity_path

    assert key_opening.begin(settings) is None
    assert not path.exists()
    with pytest.raises(ConfigurationError, match=re.escape(f"make it with `kms keygen -o {in_shell(path)}`")):
        key_opening.own_key(settings, key_opening.SPOOL)


# -- settings ----------------------------------------------------------------------------------------


def test_the_files_that_may_be_sealed_have_names(tmp_path: Path) -> None:
    text = (
        '[kms.keys]\npayroll = ["age:///p?public=/q&seal=false", "transit:p"]\n'
        'root = { uri = "age:///r", use = "seal" }\nhr = { uri = "age:///h" }\n'
        '[kms.transit]\naddress = "http://localhost"\ntoken = "${T:-x}"\n'
    )
    found = read(tmp_path, text, state_dir=tmp_path / "state")

    assert {str(path) for path in key_opening.key_locations(found).values()} == {
        "/p",
        "/h",
        f"{tmp_path}/state/age/private_key.txt",
    }
    assert set(key_opening.own_files(found)) == {"kms:spool", "kms:intake", "kms:audit", "kms:audit-signing"}
    assert key_opening.sealed_files(found) == {}


def test_a_root_is_no_default_key(tmp_path: Path) -> None:
    text = '[kms]\ndefault_key_id = "r"\nkeys.r = { uri = "age:///r", use = "seal" }\n'

    assert "kms.default_key_id" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{ uri = "age:///r", use = "other" }', "kms.keys.r.use: expected one of data, seal"),
        ('{ uri = "age:///r", usage = "seal" }', "kms.keys.r.usage is not a setting"),
        ('{ use = "seal" }', "kms.keys.r.uri is missing"),
        ("7", "kms.keys.r: expected"),
        ('{ uri = "seal" }', "kms.keys.r: expected a URI"),
    ],
)
def test_other_tables_of_keys_are_refused(tmp_path: Path, value: str, said: str) -> None:
    assert said in refusal(tmp_path, f"[kms.keys]\nr = {value}\n")


def test_roots_are_not_among_the_keys(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "age"
    age_backend(folder, x25519.X25519Identity.generate())
    write_identities(tmp_path / "r", x25519.X25519Identity.generate())
    text = f'[kms.keys]\nr = {{ uri = "age://{tmp_path}/r", use = "seal" }}\n'
    ring = keyring.build(read(tmp_path, text, state_dir=tmp_path / "state"))

    assert set(ring.keys) == set(ring.for_job().keys) == {"default"}
    for key_id in ("r", "no-such-key"):
        with pytest.raises(UnknownKey, match=f"^{UnknownKey.summary}$"):
            ring.named(key_id)

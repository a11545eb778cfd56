"""The key files of an installation: their names and places, and the spool key of a new one."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyrage
import pytest

from kms_core import key_opening, keyring
from kms_core.age import x25519
from kms_core.secure_files import in_shell
from kms_protocol.errors import ConfigurationError, UnknownKey
from support.age_kms import age_backend, write_identities
from support.settings_files import read, refusal

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

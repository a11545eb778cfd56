"""What a host tells others of itself, by which they see that it does not belong to them."""

from pathlib import Path

from kms_core import key_opening, keyring
from kms_core.container import facts_of
from kms_core.jobs.model import RecordKey
from support.service import Service


def test_a_host_with_another_spool_key_is_told_apart_and_shows_nothing_of_it(tmp_path: Path) -> None:
    settings = Service(tmp_path, redis="unix:///nonexistent.sock").settings
    keys = keyring.build(settings, key_opening.of_process(settings))

    def shared(secret: bytes) -> dict[str, str]:
        return facts_of(settings, keys, RecordKey((secret,))).shared

    one, other = shared(b"a" * 32), shared(b"b" * 32)
    assert one == shared(b"a" * 32)
    assert {name for name in one if one[name] != other[name]} == {"spool key"}
    assert "a" * 32 not in str(one)
    assert (b"a" * 32).hex() not in str(one)

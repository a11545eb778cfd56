"""The list of keys while servers of some do not answer."""

from threading import Barrier
from types import SimpleNamespace
from typing import cast

from kms_api.deps import Service
from kms_api.routes.keys import visible
from kms_core.auth.policy import AllowAll, Principal
from kms_core.backends.remote import RemoteBackend
from kms_core.keyring import Key, Keyring
from kms_core.settings.model import RotationSection
from kms_protocol.errors import JobsUnavailable
from support.memory_kms import NO_RETRIES, FrozenCipher, memory_backend


def no_counts() -> None:
    raise JobsUnavailable


def test_servers_are_asked_at_the_same_time() -> None:
    """Else each one that is frozen makes the list later by its whole timeout."""
    called = Barrier(3)
    keys = {
        name: Key(name, RemoteBackend(FrozenCipher(name, called), policy=NO_RETRIES))
        for name in ("a", "b", "c")
    }
    keys["d"] = Key("d", memory_backend()[0])
    kms = SimpleNamespace(policy=AllowAll(), keyring=Keyring(keys, keys["a"]))
    settings = SimpleNamespace(kms=SimpleNamespace(rotation=RotationSection()))
    service = SimpleNamespace(kms=kms, settings=settings, answering=no_counts)

    found = visible(cast("Service", service), Principal("local"))

    assert [(key.id, key.current_version) for key in found] == [
        ("a", None),
        ("b", None),
        ("c", None),
        ("d", "1"),
    ]

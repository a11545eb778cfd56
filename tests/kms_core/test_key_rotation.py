"""Rotation while servers do not answer: asked in turn, each would delay the others by its whole timeout."""

from threading import Barrier

from kms_core import key_rotation
from kms_core.backends import KeyVersion
from kms_core.backends.remote import RemoteBackend
from kms_core.key_rotation import RotationState
from kms_core.observability.metrics import MESSAGES
from kms_core.settings.model import RotationSection
from support.age_kms import kms_over
from support.memory_kms import NO_RETRIES, FrozenCipher, memory_backend


def frozen(*names: str) -> dict[str, RemoteBackend]:
    """Keys of servers that give no answer until all of them were asked."""
    called = Barrier(len(names))
    return {name: RemoteBackend(FrozenCipher(name, called), policy=NO_RETRIES) for name in names}


def test_servers_are_asked_for_versions_at_the_same_time() -> None:
    spent = {f"{MESSAGES} default 1 memory": key_rotation.BUDGET_MESSAGES}
    kms = kms_over(memory_backend()[0], frozen("a", "b", "c"))

    due = key_rotation.find_due(kms.keyring, spent, RotationSection(every_days=90))

    assert [state.key_id for state in due] == ["default"]


def test_keys_are_rotated_at_the_same_time() -> None:
    backend, peer = memory_backend()
    kms = kms_over(backend, frozen("a", "b", "c"))
    due = [RotationState(key_id, "memory", KeyVersion("1"), 1.0, None) for key_id in kms.keyring.keys]

    key_rotation.rotate_due(kms, due)

    assert list(peer.keys) == ["1", "2"]

"""The backends that wrote ``v2/age-wraps.json`` and ``v2/shared.json``, over the keys of ``v1/``."""

from typing import Final, cast

from kms_core.backends.age import AgeBackend
from kms_core.backends.remote import RemoteBackend, SharingBackend
from kms_core.backends.wrap_keys import WrapKeys
from support.golden import backends, golden_set

PATH: Final = golden_set.V1.parent / "v2/age-wraps.json"
SHARED: Final = golden_set.V1.parent / "v2/shared.json"


def sharing(name: str) -> SharingBackend:
    """A remote key of ``v1`` as ``share=5m``."""
    return SharingBackend(cast("RemoteBackend", backends.of(name)), WrapKeys(), 300.0)


def backend_of(name: str) -> AgeBackend:
    """The age key of ``v1`` as ``native=false``."""
    return backends.age(name, native=False)

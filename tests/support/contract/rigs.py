"""One rig for each kind of backend: a key of it, and the means to rotate, break and mend it.

A new backend adds a class and a line in ``MAKERS``; every law of the contract then holds it too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from kms_core.age import mlkem768x25519, x25519
from kms_core.backends import Backend
from support.age_kms import age_backend
from support.contract.cosmian_double import NEW, OLD
from support.contract.rig_aws import AwsRig
from support.contract.rig_cosmian import CosmianRig
from support.contract.rig_vault import KvRig, TransitRig


class Rig(Protocol):
    """A backend under test."""

    @property
    def backend(self) -> Backend:
        """One key."""

    @property
    def other(self) -> Backend:
        """Another key of the same kind."""

    def rotate(self) -> None:
        """Make a new version of the key, by the means that an operator has."""

    def break_it(self) -> None:
        """Take away what the key depends on."""

    def mend(self) -> None:
        """Give it back."""


class AgeRig:
    """Key files in a directory of their own."""

    def __init__(
        self,
        directory: Path,
        kind: type[x25519.X25519Identity | mlkem768x25519.HybridIdentity],
        *,
        native: bool = True,
    ) -> None:
        self._private = directory / "private_key.txt"
        self.backend: Backend = age_backend(directory, kind.generate(), native=native)
        self.other: Backend = age_backend(directory / "other", kind.generate(), native=native)

    def rotate(self) -> None:
        self.backend.rotate()

    def break_it(self) -> None:
        self._private.rename(self._private.with_suffix(".away"))

    def mend(self) -> None:
        self._private.with_suffix(".away").rename(self._private)


MAKERS: Final[dict[str, Callable[[Path], Rig]]] = {
    "age": lambda directory: AgeRig(directory, x25519.X25519Identity),
    "age-hybrid": lambda directory: AgeRig(directory, mlkem768x25519.HybridIdentity),
    "age-wraps": lambda directory: AgeRig(directory, x25519.X25519Identity, native=False),
    "awskms": lambda _: AwsRig(),
    "cosmian": lambda _: CosmianRig(NEW, "kmip"),
    "cosmian-jose": lambda _: CosmianRig(NEW, "jose"),
    "cosmian-4": lambda _: CosmianRig(OLD, "kmip"),
    "transit": lambda _: TransitRig(),
    "vault-kv": lambda _: KvRig(),
}

"""Transit and KV of a real OpenBao server for the contract."""

from uuid import uuid4

from kms_core.backends import Backend
from kms_core.backends.remote import RemoteBackend
from support.openbao import bao, kv, transit


class TransitRig:
    """Two keys of one mount; broken by a key that was deleted, which OpenBao can take back."""

    def __init__(self) -> None:
        self._key = bao().new_key()
        bao().admin("POST", f"transit/keys/{self._key}/config", {"deletion_allowed": True})
        self.backend: Backend = RemoteBackend(transit(bao(), self._key))
        self.other: Backend = RemoteBackend(transit(bao(), bao().new_key()))

    def rotate(self) -> None:
        self.backend.rotate()

    def break_it(self) -> None:
        bao().admin("DELETE", f"transit/keys/{self._key}/soft-delete")

    def mend(self) -> None:
        bao().admin("POST", f"transit/keys/{self._key}/soft-delete-restore")


class KvRig:
    """Two secrets of one mount, of which nothing stays in memory; broken by a deletion, as above."""

    def __init__(self) -> None:
        self._path = f"contract/{uuid4().hex}"
        self.backend: Backend = RemoteBackend(kv(bao(), self._path))
        self.backend.rotate()  # the first version
        self.other: Backend = RemoteBackend(kv(bao(), f"{self._path}/other"))
        self.other.rotate()

    def rotate(self) -> None:
        self.backend.rotate()

    def break_it(self) -> None:
        bao().admin("DELETE", f"secret/data/{self._path}")

    def mend(self) -> None:
        bao().admin("POST", f"secret/undelete/{self._path}", {"versions": [1]})

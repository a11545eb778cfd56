"""Recipients ``age1kms1…`` and identities ``AGE-PLUGIN-KMS-1…``: which key, which context, and where to ask.

Neither holds a secret: the token that opens anything comes from a file (``KMS_TOKEN_FILE``). Both are the
same data: one byte for the version of the format, then JSON.
"""

from dataclasses import dataclass, field
from typing import Annotated, Final, Self

import msgspec
from msgspec import Meta

from kms_client.settings import checked_address
from kms_core.age import bech32
from kms_protocol.context import Context
from kms_protocol.errors import KmsError
from kms_protocol.wire import KeyId

RECIPIENT_PREFIX: Final = "age1kms"
IDENTITY_PREFIX: Final = "AGE-PLUGIN-KMS-"
_VERSION: Final = b"\x01"
_LONGEST: Final = 32 * 1024  # characters; a context of 8 KiB fits


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON, whose names are short since people see its length."""

    key: KeyId | None = None
    ctx: dict[str, str] = {}
    url: Annotated[str, Meta(max_length=2048)] | None = None
    local: bool = False


@dataclass(frozen=True, slots=True)
class PluginTarget:
    """A key, a context and a place.

    ``key_id`` None is the service's default key, and in an identity any key. ``url`` None is the address
    that the environment names. ``in_process`` asks no service, but the settings of this machine.
    """

    key_id: str | None = None
    context: Context = field(default_factory=Context, repr=False)
    url: str | None = None
    in_process: bool = False

    @classmethod
    def of_recipient(cls, text: str) -> Self:
        """Raises ValueError, in words for whoever gave it."""
        return cls._read(text, RECIPIENT_PREFIX)

    @classmethod
    def of_identity(cls, text: str) -> Self:
        """Raises ValueError, in words for whoever gave it."""
        return cls._read(text, IDENTITY_PREFIX)

    def recipient(self) -> str:
        return bech32.encode(RECIPIENT_PREFIX, self._data())

    def identity(self) -> str:
        return bech32.encode(IDENTITY_PREFIX, self._data())

    @classmethod
    def _read(cls, text: str, wanted: str) -> Self:
        if len(text) > _LONGEST:
            raise ValueError("it is too long")
        prefix, data = bech32.decode(text)
        if prefix.lower() != wanted.lower():
            raise ValueError(f"it does not begin with {wanted}1")
        if not data and wanted == IDENTITY_PREFIX:  # ``age -j kms``: any key, no context
            return cls()
        if data[:1] != _VERSION:
            raise ValueError("it is of a later version of kms: update kms")
        try:
            said = msgspec.json.decode(data[1:], type=_Said)
            context = Context.parse(said.ctx)
            url = said.url and checked_address(said.url)
        except (msgspec.DecodeError, UnicodeDecodeError, KmsError):
            raise ValueError("it is damaged, or was not made by kms") from None
        if url and said.local:
            raise ValueError("it names a service and asks for none")
        return cls(said.key, context, url, said.local)

    def _data(self) -> bytes:
        said = _Said(self.key_id, dict(self.context.pairs), self.url, self.in_process)
        return _VERSION + msgspec.json.encode(said)

"""Recipients ``age1kms1…`` and identities ``AGE-PLUGIN-KMS-1…``: a key, a context, and an address.

Neither contains a secret: decryption requires a token from a file (``KMS_TOKEN_FILE``). Both encode the same
data: one byte for the version of the format, then JSON.
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


class _TargetJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON, with short names to keep recipients short."""

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

    def recipient(self) -> str:
        return bech32.encode(RECIPIENT_PREFIX, self._data())

    def identity(self) -> str:
        return bech32.encode(IDENTITY_PREFIX, self._data())

    @classmethod
    def parse(cls, text: str, wanted: str) -> Self:
        """Parse a recipient or an identity, by its prefix ``wanted``.

        Raises ValueError with a message for its user.
        """
        if len(text) > _LONGEST:
            raise ValueError("it is too long")
        prefix, data = bech32.decode(text)
        if prefix.lower() != wanted.lower():
            raise ValueError(f"it does not begin with {wanted}1")
        if not data and wanted == IDENTITY_PREFIX:  # ``age -j kms``: any key, no context
            return cls()
        if data[:1] != _VERSION:
            raise ValueError("it was made by a later version of kms: update kms")
        try:
            content = msgspec.json.decode(data[1:], type=_TargetJson)
            context = Context.parse(content.ctx)
            url = content.url and checked_address(content.url)
        except (msgspec.DecodeError, UnicodeDecodeError, KmsError):
            raise ValueError("it is damaged, or was not made by kms") from None
        if url and content.local:
            raise ValueError("it names both a service and the keys in process")
        return cls(content.key, context, url, content.local)

    def _data(self) -> bytes:
        content = _TargetJson(self.key_id, dict(self.context.pairs), self.url, self.in_process)
        return _VERSION + msgspec.json.encode(content)

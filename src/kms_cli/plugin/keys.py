"""Who wraps and unwraps for the plugin: the service, or this process with the keys of its own settings."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, Protocol

from kms_cli.plugin.names import PluginTarget
from kms_client import DEFAULT_URL, Client
from kms_core import keyring
from kms_core.age.header import FILE_LIMITS
from kms_core.audit import AuditRecord
from kms_core.auth.policy import AllowAll, Principal
from kms_core.key_selection import SelectionRules
from kms_core.service import Kms
from kms_core.settings.load import load as load_settings
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError

_YES: Final = frozenset({"1", "true", "t", "yes", "y", "on"})  # as the kms command takes it
HERE: Final = Principal("local")


class PluginKeys(Protocol):
    """Stanzas are text, as in a header. Methods raise KmsError."""

    def wrap(self, file_key: bytes, target: PluginTarget) -> bytes:
        """One stanza that wraps the 16 bytes."""

    def unwrap(self, stanzas: bytes, target: PluginTarget) -> bytes:
        """The 16 bytes again."""


class OfService:
    """The client's address and token, as the ``kms`` command takes them from the environment.

    A recipient may name another address, but it never makes the token go there: who writes recipients must
    not be able to fetch tokens.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._url = environ.get("KMS_SERVICE_URL")
        self._token_file = environ.get("KMS_TOKEN_FILE")
        self._allow_http = environ.get("KMS_ALLOW_HTTP", "").lower() in _YES

    def wrap(self, file_key: bytes, target: PluginTarget) -> bytes:
        with self._client(target) as kms:
            made = kms.wrap(file_key, context=dict(target.context.pairs), key_id=target.key_id)
        return made.stanza

    def unwrap(self, stanzas: bytes, target: PluginTarget) -> bytes:
        with self._client(target) as kms:
            found = kms.unwrap(stanzas, context=dict(target.context.pairs), key_id=target.key_id)
        return found.file_key

    def _client(self, target: PluginTarget) -> Client:
        own = (self._url or DEFAULT_URL).rstrip("/")
        url = target.url or own
        if self._token_file and url != own:
            raise ConfigurationError(
                f"The token in KMS_TOKEN_FILE is for {own}, and this recipient or identity names {url}: "
                f"if the token may go there, set KMS_SERVICE_URL={url}"
            )
        return Client(url, token_file=self._token_file, allow_http=self._allow_http)


class InProcess:
    """Keys of the settings file, in this process. Policy and audit are the service's; there is none here."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises ConfigurationError. The working directory counts for nothing (see ``main``)."""
        named = environ.get("KMS_CONFIG")
        if named and not Path(named).is_absolute():
            raise ConfigurationError("An age plugin needs an absolute path in KMS_CONFIG")
        settings = load_settings(None, environ)
        rules = SelectionRules(settings.kms.require_context, FILE_LIMITS)
        self._kms = Kms(keyring.build(settings), AllowAll(), _NoTrail(), rules)

    def wrap(self, file_key: bytes, target: PluginTarget) -> bytes:
        return self._kms.wrap(HERE, file_key, target.context, key_id=target.key_id).stanza

    def unwrap(self, stanzas: bytes, target: PluginTarget) -> bytes:
        return self._kms.unwrap(HERE, stanzas, target.context, key_id=target.key_id).file_key


class _NoTrail:
    """Whoever holds the keys themselves needs no leave, and could leave no trace."""

    def append(self, record: AuditRecord) -> str:
        del record
        return ""

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        del tenant, context
        return {}

    def check(self) -> None:
        pass

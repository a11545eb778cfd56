"""The tables of the two backends on OpenBao or Vault."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from kms_core import sections
from kms_core.sections import BackendSection, Timeout
from kms_protocol.errors import ConfigurationError

_NAMESPACE: Final = re.compile(r"[\w.~-]+(?:/[\w.~-]+)*/?", re.ASCII)
_RISK: Final = "the network can read the token and file keys"


class VaultSection(BackendSection, frozen=True, kw_only=True):
    """The keys that ``[kms.transit]`` and ``[kms.vault_kv]`` have in common: a server and our token there."""

    CREDENTIAL: ClassVar = "token"
    SECRET_FILES: ClassVar = ("token_file", "client_key")
    CERTIFICATE: ClassVar = "client_cert"
    WEAK_VALUES: ClassVar = (
        sections.cleartext("address", _RISK),
        sections.unverified(_RISK),
    )

    address: str | None = None
    token: str | None = None
    token_file: Path | None = None
    namespace: str | None = None
    tls_verify: bool = True
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    timeout_s: Timeout = 5.0

    def check(self, where: str, *, in_prod: bool) -> None:
        sections.check_address(f"{where}.address", self.address, in_prod=in_prod)
        sections.check_verified(where, tls_verify=self.tls_verify, in_prod=in_prod)
        sections.check_pair(where, self, "client_cert", "client_key")
        if bool(self.token) == bool(self.token_file):
            raise ConfigurationError(
                f"{where}.token_file: name the file that holds our token, "
                f'or set token = "${{VAULT_TOKEN}}", and not both'
            )
        if self.namespace is not None and not _NAMESPACE.fullmatch(self.namespace):
            raise ConfigurationError(f"{where}.namespace: expected a path such as team/payroll")


class TransitSection(VaultSection, frozen=True, kw_only=True):
    """``[kms.transit]``: required where transit is the active backend or the URI of a key names it."""

    MODULE: ClassVar = "kms_core.backends.vault.transit"

    mount: str = "transit"
    key_name: str | None = None


class VaultKvSection(VaultSection, frozen=True, kw_only=True):
    """``[kms.vault_kv]``: as ``[kms.transit]``, for vault-kv. Keys stay in memory for ``cache_s`` seconds."""

    MODULE: ClassVar = "kms_core.backends.vault.kv"

    mount: str = "secret"
    path: str | None = None
    kv_version: Literal[1, 2] = 2
    cache_s: Annotated[float, Meta(ge=0, le=3600)] = 60.0

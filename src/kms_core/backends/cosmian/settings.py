"""The table of the Cosmian backend."""

from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from kms_core import sections
from kms_core.sections import BackendSection, Timeout, WeakValue
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError
from kms_protocol.wire import KeyId


def _has_no_credential(section: "CosmianSection") -> bool:
    is_local = is_loopback(urlsplit(section.server_url or "").hostname)
    return not (is_local or section.api_key or section.api_key_file or section.client_cert_file)


class CosmianSection(BackendSection, frozen=True, kw_only=True):
    """``[kms.cosmian]``: required where Cosmian is the active backend or the URI of a key names it."""

    MODULE: ClassVar = "kms_core.backends.cosmian.backend"
    CREDENTIAL: ClassVar = "api_key"
    SECRET_FILES: ClassVar = ("api_key_file", "client_key_file")
    CERTIFICATE: ClassVar = "client_cert_file"
    WEAK_VALUES: ClassVar = (
        sections.cleartext("server_url", "the network can read the API key and file keys"),
        sections.unverified("an impostor of the server can read the API key"),
        WeakValue(
            "api_key",
            _has_no_credential,
            "every client that reaches the key server can use its keys",
            "require an API key or a client certificate there",
        ),
    )

    server_url: str | None = None
    api_key: str | None = None
    api_key_file: Path | None = None
    default_key_id: KeyId = "provisioning-master-key"
    protocol: Literal["auto", "kmip", "jose"] = "auto"
    tls_verify: bool = True
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    timeout_s: Timeout = 5.0

    def check(self, where: str, *, in_prod: bool) -> None:
        if not self.server_url:
            raise ConfigurationError(f"{where}.server_url is missing: set it, or export COSMIAN_KMS_URL")
        sections.check_address(f"{where}.server_url", self.server_url, in_prod=in_prod)
        sections.check_verified(where, tls_verify=self.tls_verify, in_prod=in_prod)
        if self.api_key and self.api_key_file:
            raise ConfigurationError(f"{where}.api_key_file: set it, or api_key, and not both")
        sections.check_pair(where, self, "client_cert_file", "client_key_file")

    def own_key_id(self) -> str | None:
        return self.default_key_id

"""The table of the AWS KMS backend."""

from pathlib import Path
from typing import ClassVar

from kms_core.sections import BackendSection, Timeout, check_address, is_cleartext
from kms_protocol.errors import ConfigurationError


class AwsKmsSection(BackendSection, frozen=True, kw_only=True):
    """``[kms.awskms]``: defaults of all AWS keys, and the key in use where AWS KMS is the active backend.

    None leaves the choice to AWS's own configuration: ``AWS_*`` variables, ``~/.aws``, a role of the machine.
    """

    MODULE: ClassVar = "kms_core.backends.aws.backend"

    key_id: str | None = None
    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    ca_file: Path | None = None
    timeout_s: Timeout = 5.0

    def check(self, where: str, *, in_prod: bool) -> None:
        if self.endpoint_url is not None:
            check_endpoint(f"{where}.endpoint_url", self.endpoint_url, in_prod=in_prod)


def check_endpoint(where: str, url: str, *, in_prod: bool) -> None:
    """Refuse what ``check_address`` does, and ``http://`` off loopback, since requests hold file keys."""
    check_address(where, url, in_prod=in_prod)
    if is_cleartext(url):
        raise ConfigurationError(f"{where}: http:// is for loopback only; use https://")

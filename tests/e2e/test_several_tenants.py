"""Whether the jobs of an install can come from more than one tenant: by its settings and its tokens."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kms_core.auth import tokens
from kms_core.container import token_source
from support.credentials import REQUIRED, SecuredService, required_with_issuer

TLS = '[kms.server]\ntls_cert = "/nonexistent"\ntls_key = "/nonexistent"\nclient_ca = "/nonexistent"\n'
CERTIFICATE = '[kms.auth.certificates.{0}]\nsubject = "DNS:{0}"\nscopes = ["*"]\ntenant = "{0}"\n'
ISSUER = required_with_issuer('jwks_file = "/nonexistent"', 'tenant_claim = "t"\ntenants = [{}]')


def asks(install: SecuredService) -> Callable[[], bool]:
    return tokens.several_tenants(install.settings, token_source(install.settings, None))


@pytest.mark.parametrize(
    ("settings", "several"),
    [
        ("", False),
        ("[kms.tenants.a]\n[kms.tenants.b]\n", False),  # nobody is asked who they are
        (REQUIRED, False),
        (f"{REQUIRED}[kms.tenants.a]\n", False),
        (f"{REQUIRED}[kms.tenants.a]\n[kms.tenants.b]\n", True),
        (REQUIRED + TLS + CERTIFICATE.format("a"), False),
        (REQUIRED + TLS + CERTIFICATE.format("a") + CERTIFICATE.format("b"), True),
        (ISSUER.format('"a"'), False),
        (ISSUER.format('"a", "b"'), True),
        (ISSUER.format('"a"') + TLS + CERTIFICATE.format("b"), True),
    ],
)
def test_tenants_of_the_settings(tmp_path: Path, settings: str, *, several: bool) -> None:
    assert asks(SecuredService(tmp_path, settings))() == several


def test_tokens_come_and_go(tmp_path: Path) -> None:
    install = SecuredService(tmp_path)
    several = asks(install)

    install.new_token("*", tenant="a")
    install.new_token("*", tenant="a")
    assert not several()
    install.new_token("*", tenant="b")
    assert several()


def _unreadable(path: Path) -> None:
    path.write_text("no tokens")


def _writable_by_others(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize("spoil", [_unreadable, _writable_by_others])
def test_token_file_that_cannot_be_read_counts_as_several(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    install = SecuredService(tmp_path)
    several = asks(install)
    install.new_token("*")
    assert not several()

    spoil(install.token_file)
    os.utime(install.token_file)

    assert several()

"""What settings allow although it is weaker than need be: told by ``kms config lint`` and by a metric."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kms_core.settings_remote import is_loopback
from kms_core.settings_sections import Settings

SETTINGS: Final = (
    "cosmian.tls_verify",
    "auth.mode",
    "allow_age_in_prod",
    "require_context",
    "age.accept_foreign",
    "audit.durability",
)


@dataclass(frozen=True, slots=True)
class Weakness:
    """``setting`` is its dotted name; ``advice`` says what is at stake and what to write instead."""

    setting: str
    advice: str


def weaknesses(settings: Settings) -> Iterator[Weakness]:
    """Those of any environment first; some matter in prod alone. Values are never quoted."""
    kms = settings.kms
    if "cosmian" in settings.used_backends and not kms.cosmian.tls_verify:
        yield Weakness("cosmian.tls_verify", "anybody on the way can read the API key: name a CA in ca_file")
    if kms.auth.mode == "none" and not is_loopback(kms.bind):
        yield Weakness(
            "auth.mode", "whoever reaches the port may use every key, unless a proxy stands before it"
        )
    if not settings.is_prod:
        return
    if "age" in settings.used_backends:
        yield Weakness("allow_age_in_prod", "keys lie in files of this host, and whoever reads one opens all")
    if not kms.require_context:
        yield Weakness("require_context", "a ciphertext without context opens in any place it is copied to")
    if settings.accept_foreign:
        yield Weakness("age.accept_foreign", "files that others made for the public key are taken for ours")
    if kms.audit.durability == "write":
        yield Weakness("audit.durability", "a power cut loses the records of the last seconds: write fsync")

"""Whether the jobs of an install can come from more than one tenant, by its settings and its token file."""

from collections.abc import Callable

from kms_core.auth.tokens import TokenFile
from kms_core.settings.model import Settings
from kms_protocol.errors import Unavailable


def several(settings: Settings) -> Callable[[], bool]:
    """A function that answers it for now: tokens come and go while the service runs.

    Without authentication all callers are of one tenant. A token file that cannot be read counts as several.
    """
    kms = settings.kms
    if kms.auth.mode != "required":
        return lambda: False
    named = {
        *kms.tenants,
        *(section.tenant for section in kms.auth.certificates.values()),
        *(name for section in kms.auth.issuers.values() for name in section.tenants or (section.tenant,)),
    }
    tokens = TokenFile(kms.auth.tokens_path, strict=settings.is_prod)

    def answer() -> bool:
        if len(named) > 1:
            return True
        try:
            return len(named | tokens.tenants()) > 1
        except Unavailable:
            return True

    return answer

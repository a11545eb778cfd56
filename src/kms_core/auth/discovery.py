"""Where an issuer of JWTs keeps its keys, by its own word (OpenID Connect Discovery 1.0 §4).

The document is asked for whenever the key set is, and believed only if it names the issuer to the letter: it
says where keys are, so whoever could exchange it could sign.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from kms_protocol.wire import NOT_JSON

WELL_KNOWN: Final = "/.well-known/openid-configuration"


class _DiscoveryDocument(msgspec.Struct):
    issuer: str
    jwks_uri: str


def finding(
    issuer: str, fetch: Callable[[str], bytes], may_fetch: Callable[[str], bool]
) -> Callable[[], bytes]:
    """How to get an issuer's key set by its name alone.

    ``fetch`` gets what is at a URL; ``may_fetch`` says which URLs a document may name. The result raises
    what ``fetch`` does, and ValueError for a document that is none of this issuer's.
    """
    address = issuer.removesuffix("/") + WELL_KNOWN

    def found() -> bytes:
        try:
            document = msgspec.json.decode(fetch(address), type=_DiscoveryDocument)
        except NOT_JSON as exc:
            raise ValueError("the discovery document is not JSON with an issuer and a jwks_uri") from exc
        if document.issuer != issuer:
            raise ValueError("the discovery document is of another issuer than the settings name")
        if not may_fetch(document.jwks_uri):
            raise ValueError("the discovery document names no https:// address of keys")
        return fetch(document.jwks_uri)

    return found

"""Tokens in a signed document that hosts share: read from this host's copy, made and revoked everywhere."""

from typing import Final

from kms_core.auth.tokens import NONE, KnownTokens, Token, Tokens, TokensBody, UnknownToken, log_change
from kms_core.documents.local_copy import LocalCopy
from kms_core.documents.signed import Version
from kms_protocol.errors import ConfigurationError, Unavailable

NAME: Final = "tokens"
INFO: Final = b"kms-service/document/1/tokens"


class DocumentTokens(Tokens):
    """Raises Unavailable, and refuses no token, while the copy is missing or too old.

    A token that the copy does not have may have just been made: the document is read again before it is
    refused, unless it was revoked.
    """

    def __init__(self, copy: LocalCopy) -> None:
        self._copy = copy
        self._held = Version(), KnownTokens((0,))

    def of_digest(self, token_id: str, digest: bytes) -> Token:
        """As for a file; one that was not revoked and is unknown so far raises UnknownToken to look up."""
        try:
            return super().of_digest(token_id, digest)
        except UnknownToken:
            if token_id in self._fresh().revoked:
                raise
        raise UnknownToken(self._copy.reread, self)

    def by_id(self, token_id: str) -> Token | None:
        """As for a file. Blocks for a token that is unknown and was not revoked: it may be new."""
        known = self._fresh()
        if token_id not in known.tokens and token_id not in known.revoked:
            self._copy.reread()
        return super().by_id(token_id)

    def is_current(self) -> bool:
        """True if the document was read in the last ten seconds, or ``max_stale_s`` if that is less."""
        return not self._copy.is_late

    def _fresh(self) -> KnownTokens:
        version = self._copy.current()
        held, known = self._held
        if version is held:
            return known
        try:
            now = KnownTokens.of((version.generation,), TokensBody.of(version.body or NONE))
        except ConfigurationError as exc:
            raise Unavailable("The tokens were written by a later version of the service") from exc
        log_change(known, now)
        self._held = version, now
        return now

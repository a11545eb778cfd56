"""Reviews of tokens by a Kubernetes API server (TokenReview, authentication.k8s.io/v1)."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from kms_core.auth.tokens import REFUSED, UnknownToken
from kms_core.http_client import Peer
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, Unauthenticated, Unavailable

REMEMBERED_S: Final = 60.0
MOST_REMEMBERED: Final = 4096
_AGAIN_S: Final = 5.0
_REVIEWS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_NO_REVIEW: Final = "The API server that reviews this token does not answer as it should"
_log = structlog.get_logger(__name__)


class _User(msgspec.Struct):
    username: str = ""


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] = []
    error: str = ""


class _Review(msgspec.Struct, rename="camel"):
    api_version: Literal["authentication.k8s.io/v1"]
    kind: Literal["TokenReview"]
    status: _Status


class Reviews:
    """Reviews tokens for one audience, and remembers accepted ones for a minute. Safe in several threads."""

    def __init__(
        self, server: Peer, token_file: Path, audience: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``token_file`` has the token of the reviewer for ``server``, and is read for each review."""
        self._server, self._token_file, self._audience, self._clock = server, token_file, audience, clock
        self._accepted: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def check(self, text: str, subject: object) -> None:
        """Return if the API server has accepted a token as this user. Does no network access.

        Raises Unauthenticated for another user; UnknownToken, whose look-up asks the API server, before.
        """
        digest = hashlib.sha256(text.encode("ascii")).digest()
        username, until = self._accepted.get(digest, ("", 0.0))
        if self._clock() >= until:
            raise UnknownToken(partial(self._review, text, digest), self)
        if username != subject:
            raise Unauthenticated(REFUSED, reason="review")

    def _review(self, text: str, digest: bytes) -> None:
        """Blocks for at most ten seconds. Raises Unauthenticated; Unavailable without a good answer."""
        asked = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": text, "audiences": [self._audience]},
        }
        try:
            own = small_files.read(self._token_file).decode("ascii").strip()
            headers = {"Authorization": f"Bearer {own}"}
            answer = self._server.call("POST", _REVIEWS, msgspec.json.encode(asked), headers=headers)
            if not answer.ok:
                raise answer.unexpected_error()
            status = answer.read(_Review).status
        except (BackendUnavailable, OSError, ValueError) as exc:
            _log.warning("token_review.failed", error=type(exc).__name__)
            raise Unavailable(_NO_REVIEW, retry_after_s=_AGAIN_S) from exc
        # An API server that knows no audiences leaves them out, and has accepted any.
        is_for_us = self._audience in status.audiences
        if not status.authenticated or status.error or not is_for_us or not status.user.username:
            raise Unauthenticated(REFUSED, reason="review")
        self._accepted[digest] = status.user.username, self._clock() + REMEMBERED_S
        if len(self._accepted) > MOST_REMEMBERED:
            self._accepted.popitem(last=False)

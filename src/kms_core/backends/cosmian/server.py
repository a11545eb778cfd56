"""One Cosmian KMS server: our credentials, the dialect that its version speaks, and which keys are ours.

The version is asked for at the first call, and again after a failure to reach the server, which may have
been replaced meanwhile. Knows no versions of keys.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Final, Literal
from urllib.parse import quote

from kms_core.backends.cosmian.jose import Jose, jwe_aad
from kms_core.backends.cosmian.kmip import GcmResult, Kmip, Messages, Singles
from kms_core.backends.token_file import FileToken
from kms_core.http_client import Busy, Unreachable
from kms_core.http_client.peer import Peer, PeerAnswer, PeerServer
from kms_protocol.errors import BackendUnavailable

Protocol = Literal["auto", "kmip", "jose"]
LANES: Final = 2  # a second caller does not wait for the first one's round trip; more gain nothing
_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.")
_MESSAGES_FROM: Final = (5, 0)
_JOSE_FROM: Final = (5, 23)


class CosmianServer:
    """Safe to use from several threads."""

    def __init__(
        self, server: PeerServer, token: FileToken | None, protocol: Protocol = "auto", *, lanes: int = LANES
    ) -> None:
        """Connects to nothing. Raises ConfigurationError if a TLS file cannot be used.

        ``lanes``: how many messages of several operations may be under way at a time.
        """
        self.where = server.where
        self.section = server.setting.rpartition(".")[0]
        self._timeout_s = server.timeout_s
        self._peer = Peer(server)
        self._token = token
        self._protocol = protocol
        self._version: tuple[int, int] | None = None
        self._messages = Messages(self, lanes)
        self._new, self._old = Kmip(self._messages), Kmip(Singles(self), old=True)
        self._jose = Jose(self)

    def seal(self, uid: str, plaintext: bytes, aad: bytes) -> GcmResult | None:
        """AES-GCM by key ``uid``, the same in every dialect; None if another key did it. Raises Refusal."""
        if self._speaks_jose():
            return self._jose.seal(uid, plaintext, aad)
        return self.kmip().seal(uid, plaintext, jwe_aad(uid, aad))

    def open(self, uid: str, sealed: GcmResult, aad: bytes) -> bytes | None:
        """What ``seal`` sealed; None if another key gave it. Raises Refusal."""
        if self._speaks_jose():
            return self._jose.open(uid, sealed, aad)
        return self.kmip().open(uid, sealed, jwe_aad(uid, aad))

    def kmip(self) -> Kmip:
        """In this server's dialect."""
        return self._new if self.version() >= _MESSAGES_FROM else self._old

    def owns(self, uid: str) -> bool:
        """Whether a key belongs to the user as whom we appear; others may have lent us theirs."""
        answer = self._call("GET", f"/access/list/{quote(uid, safe='')}")
        if not answer.ok and answer.status != HTTPStatus.UNAUTHORIZED:
            raise answer.odd()
        return answer.ok

    def version(self) -> tuple[int, int]:
        """Major and minor. Raises what calls raise."""
        if self._version is None:
            answer = self._call("GET", "/version")
            found = _VERSION.match(answer.read(str)) if answer.ok else None
            if found is None:
                raise answer.odd()
            self._version = int(found[1]), int(found[2])
        return self._version

    @property
    def waiting(self) -> int:
        """How many operations wait for the next message to the server."""
        return self._messages.waiting

    def one_timeout(self) -> AbstractContextManager[None]:
        """The calls of this thread within it share one timeout."""
        return self._peer.one_timeout()

    def close(self) -> None:
        """Close what is open."""
        self._peer.close()

    # -- for the dialects ----------------------------------------------------------------------------

    def post(self, path: str, body: bytes, judged: Sequence[int] = ()) -> PeerAnswer:
        """One request as us; 4xx, and 5xx that are judged, are answered."""
        return self._call("POST", path, body, judged)

    def left_s(self) -> float:
        """Seconds left of ``one_timeout``."""
        return self._peer.left_s()

    def late(self) -> Unreachable:
        """The error for a call whose time is over."""
        return Unreachable(f"No answer from {self.where} within {self._timeout_s:g} s")

    def _call(
        self, method: str, path: str, body: bytes | None = None, judged: Sequence[int] = ()
    ) -> PeerAnswer:
        headers = {"Authorization": f"Bearer {self._token.current()}"} if self._token else {}
        try:
            answer = self._peer.call(method, path, body, headers=headers, judged=judged)
        except Unreachable:
            self._version = None
            raise
        if answer.status == HTTPStatus.UNAUTHORIZED and not answer.body.startswith(b"Access denied"):
            raise BackendUnavailable(
                f"{self.where} does not accept our credentials: check {self.section}.api_key_file "
                "(or api_key), or client_cert_file"
            )
        if answer.status == HTTPStatus.REQUEST_TIMEOUT:
            raise Busy(f"{self.where} answers {answer.status}")
        return answer

    def _speaks_jose(self) -> bool:
        if self._protocol != "jose":
            return False
        if self.version() < _JOSE_FROM:
            raise BackendUnavailable(
                f'{self.where} has no JOSE calls, which came with 5.23: set {self.section}.protocol = "kmip"'
            )
        return True

"""Calls to the secrets engines of one OpenBao or Vault server: token, namespace and errors.

A token with a limited lifetime is renewed at half of it, within the next call, without a thread. A process
without calls lets its token expire; a file that an agent keeps fresh avoids that.
"""

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final, Generic, TypeVar
from urllib.parse import SplitResult, parse_qs, quote, unquote
from weakref import WeakValueDictionary

import msgspec
import structlog

from kms_core.backends.file_token import FileToken
from kms_core.backends.vault.settings import VaultSection as Section
from kms_core.http_client import Busy, Peer, PeerAnswer, PeerServer, Tls, Unreachable
from kms_protocol.errors import BackendUnavailable, ConfigurationError, KmsError

PRODUCT: Final = "OpenBao or Vault"
TRY_AGAIN_S: Final = 30.0
SHORTEST_S: Final = 1.0
_SEALED: Final = frozenset({HTTPStatus.SERVICE_UNAVAILABLE})
_SEGMENTS: Final = re.compile(r"[\w.-]+(?:/[\w.-]+)*", re.ASCII)
Data = TypeVar("Data")
_log = structlog.get_logger(__name__)


class EngineAnswer(msgspec.Struct, Generic[Data]):
    """The envelope of every answer of an engine."""

    data: Data


class _Words(msgspec.Struct):
    errors: list[str] | None = None
    error: str | None = None  # RustyVault
    data: object = None


class _Lookup(msgspec.Struct):
    ttl: float
    renewable: bool = False


class _Lease(msgspec.Struct):
    lease_duration: float


class _Renewed(msgspec.Struct):
    auth: _Lease


@dataclass(frozen=True, slots=True)
class _Life:
    """A token's lifetime: next check, whether it is renewable, and seconds left at the last check."""

    token: str = field(default="", repr=False)
    due: float = math.inf
    renewable: bool = False
    left_s: float = 0.0


class VaultClient:
    """Calls to one server. Safe for several threads."""

    def __init__(
        self,
        server: PeerServer,
        token: FileToken,
        namespace: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server = server
        self.peer = Peer(server)
        self.token = token
        self._namespace = {"X-Vault-Namespace": namespace} if namespace else {}
        self._clock = clock
        self._renewing = threading.Lock()
        self._life = _Life()

    def call(self, method: str, path: str, document: object = None) -> PeerAnswer:
        """Send one request, and renew our token if that is due, within one timeout.

        ``path`` is the quoted part after ``/v1/``. Raises Unreachable, Busy, BackendUnavailable (our token
        or its policy). The engine interprets other statuses.
        """
        with self.peer.one_timeout():
            token = self.token.current()
            answer = self._send(token, method, path, document)
            if answer.status == HTTPStatus.FORBIDDEN:
                said(answer)  # raises for an answer of another server
                raise BackendUnavailable(
                    f"{self.server.where} refuses our token: renew the one in {self.section}.token_file, "
                    f"or let its policy allow {path}"
                )
            self._renew_when_due(token)
        return answer

    def engine_error(self, answer: PeerAnswer, mount: str, enable: str) -> BackendUnavailable | None:
        """The error for a 404 that means the mount or the namespace; None if it means the item."""
        words, where = said(answer), self.server.where
        if "namespace" in words:
            return BackendUnavailable(f"{where} has no such namespace: check {self.section}.namespace")
        if "route" in words or "mount" in words:
            return BackendUnavailable(f"{where} has nothing mounted at {mount}/: run `{enable}`")
        return None

    @property
    def section(self) -> str:
        """The name of our settings section."""
        return self.server.setting.rpartition(".")[0]

    def _send(self, token: str, method: str, path: str, document: object) -> PeerAnswer:
        body = None if document is None else msgspec.json.encode(document)
        headers = {"X-Vault-Token": token, "X-Vault-Request": "true", **self._namespace}
        answer = self.peer.call(method, f"/v1/{path}", body, headers=headers, expected=_SEALED)
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and b"sealed" in answer.body:
            raise Unreachable(f"{self.server.where} is sealed: run `bao operator unseal` there")
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise Unreachable(f"{self.server.where} answers {answer.status}")
        return answer

    # -- the token's life ---------------------------------------------------------------------------

    def _renew_when_due(self, token: str) -> None:
        """Renew the token in one thread, without failing its call, while other threads continue."""
        if not self._is_due(token) or not self._renewing.acquire(blocking=False):
            return
        try:
            if self._is_due(token):
                self._life = self._next(token)
        finally:
            self._renewing.release()

    def _is_due(self, token: str) -> bool:
        return self._life.token != token or self._clock() >= self._life.due

    def _next(self, token: str) -> "_Life":
        now, life = self._clock(), self._life if self._life.token == token else _Life(token)
        try:
            left_s, renewable = self._renew(token) if life.renewable else self._look_up(token)
        except (Unreachable, Busy) as exc:
            _log.warning("token.not_renewed", reason=exc.detail)
            return replace(life, due=now + TRY_AGAIN_S)
        except KmsError as exc:  # the policy lacks lookup-self, or the token is no longer renewable
            _log.warning("token.not_renewed", reason=exc.detail)
            return _Life(token)
        if not left_s:
            return _Life(token)  # it never expires
        if not renewable or left_s < life.left_s:  # near the end of its maximum lifetime
            _log.warning("token.expires", in_s=left_s, advice=f"put a new one into {self.section}.token_file")
        due = now + max(left_s / 2, SHORTEST_S) if renewable else math.inf
        return _Life(token, due, renewable, left_s)

    def _look_up(self, token: str) -> tuple[float, bool]:
        """Seconds left (0: no expiry), and whether the token is renewable."""
        answer = self._send(token, "GET", "auth/token/lookup-self", None)
        if not answer.ok:
            raise BackendUnavailable(f"{self.server.where} does not say how long our token lasts")
        found = answer.read(EngineAnswer[_Lookup]).data
        return found.ttl, found.renewable

    def _renew(self, token: str) -> tuple[float, bool]:
        answer = self._send(token, "POST", "auth/token/renew-self", {})
        if not answer.ok:
            raise BackendUnavailable(f"{self.server.where} does not renew our token")
        return answer.read(_Renewed).auth.lease_duration, True


def said(answer: PeerAnswer) -> str:
    """The server's error text in lower case, to distinguish cases. Never shown.

    Raises BackendUnavailable for an answer in another form than that of OpenBao, Vault and RustyVault.
    """
    if answer.status == HTTPStatus.NOT_FOUND and not answer.body:
        return ""  # RustyVault, for an item that is not there
    found = answer.read(_Words)
    if found.errors is None and found.error is None and found.data is None:
        raise answer.unexpected_error()
    return " ".join((*(found.errors or ()), found.error or "")).lower()


def path_of(text: str, what: str) -> str:
    """A mount or path of plain segments, ready for a URL. Raises ConfigurationError."""
    if not _SEGMENTS.fullmatch(text) or {".", ".."} & set(text.split("/")):
        raise ConfigurationError(f"{what}: expected letters, digits, _ . - and single slashes between them")
    return quote(text)


def located(uri: SplitResult | None, mount: str, path: str | None, usage: str) -> tuple[str, str | None]:
    """Mount and path of a key's URI; those given, of the settings, without one or where it names no mount.

    Raises ConfigurationError with ``usage``.
    """
    if uri is None:
        return mount, path
    options = parse_qs(uri.query, keep_blank_values=True)
    mounts = options.pop("mount", [mount])
    if uri.netloc or uri.fragment or options or len(mounts) != 1 or not mounts[0] or not uri.path:
        raise ConfigurationError(usage)
    return mounts[0], unquote(uri.path)


# -- opening -----------------------------------------------------------------------------------------

_open: Final[WeakValueDictionary[tuple[Section, bool], VaultClient]] = WeakValueDictionary()


def connect(section: Section, name: str, *, strict: bool) -> VaultClient:
    """The server of a settings section (``name`` is as in ``kms.transit``); keys share it."""
    if found := _open.get((section, strict)):
        return found
    address = section.address or ""  # which the settings of a used backend have
    tls = Tls(section.tls_verify, section.ca_file, section.client_cert, section.client_key)
    server = PeerServer(address, PRODUCT, f"{name}.address", section.timeout_s, tls)
    token = FileToken(section.token, section.token_file, strict=strict)
    made = _open[section, strict] = VaultClient(server, token, section.namespace)
    return made

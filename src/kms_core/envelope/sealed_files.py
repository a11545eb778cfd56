"""Key files of the service that are age files themselves: sealed under a root, opened by it.

A root is a key of the service (``use = "seal"``): then our stanzas bind the file to its name, such as
``payroll`` or ``kms:spool``, under a tenant and a context that no caller can give. Or it is the identities of
one file, native ones or those of age plugins: then any age tool can make and open it.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from kms_core.age import armor, header, stream
from kms_core.age.header import FILE_KEY_BYTES, SYNC_LIMITS, Header, Stanza
from kms_core.age.plugin_identity import PREFIX, PluginIdentity
from kms_core.age.recipients import Identity, Recipient, identities_of, parse_identity, parse_recipient
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import BoundStanzas, KeyRef
from kms_core.envelope.sealing import UnwrappedKey, Wrapper, WrappingKey
from kms_core.key_source import KeySource
from kms_protocol import small_files
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, ConfigurationError, DecryptFailed, TooLarge

TENANT: Final = "kms:sealed"
"""The tenant of sealed files; the names of tenants in settings and tokens have no colon."""
NAME: Final = "kms:sealed"
"""The pair of the context, whose value is the name of the file; callers may use no key with this prefix."""
RECOVERY: Final = "# recovery: "
"""Begins a line of the content that names a recipient, for which the file is sealed as well."""
_RECOVERY_LINE: Final = re.compile(rb"^# recovery: ([!-~]+)$", re.MULTILINE)
SealingIdentity = Identity | PluginIdentity


class NotOpenedYet(BackendUnavailable):
    """The process that opens sealed files has not seen this one yet: try again in a second."""


class SealedFiles(Protocol):
    """Opens and seals key files by their names: a key id, or ``kms:`` and one of the service's own."""

    def open(self, name: str, sealed: bytes) -> bytes:
        """The content of a sealed file.

        Raises BackendUnavailable while the root cannot be asked, ConfigurationError if it does not open it.
        """

    def seal_again(self, name: str, content: bytes, sealed: bytes) -> bytes:
        """Seal new content under the root of ``sealed``. Raises as ``open``."""

    def document(self, name: str, url: str) -> KeySource:
        """The identities of the Age key ``name`` in a signed document. Raises ConfigurationError."""


class RootKey(Protocol):
    """A key that seals files (see ``keyring.Key``)."""

    def timeout(self) -> AbstractContextManager[None]: ...
    def wrapping(self, tenant: str) -> Sequence[WrappingKey]: ...
    def first_answer(
        self,
        tenant: str,
        bound: BoundStanzas,
        unwrap: Callable[[Wrapper, KeyRef], UnwrappedKey],
        passed_over: type[BackendUnavailable],
    ) -> tuple[UnwrappedKey, KeyRef]: ...


def read_identities(path: Path | None) -> list[SealingIdentity]:
    """The identities of a file, native or of plugins. Raises ConfigurationError, which names the line.

    ``path`` is ``[kms.age] seal_identity_path``, None if it is not set.
    """
    if path is None:
        raise ConfigurationError(
            "it is sealed for age identities, and none are named: set seal_identity_path under [kms.age]"
        )
    try:
        content = small_files.read(path)
    except OSError as exc:
        raise ConfigurationError(
            f"The identity that opens sealed keys, {path}, cannot be read ({exc.strerror}): "
            "check kms.age.seal_identity_path"
        ) from exc
    found = identities_of(content, path, _parsed_identity, remedy="kms.age.seal_identity_path needs one")
    return [identity for identity, _ in found]


def _parsed_identity(text: str) -> SealingIdentity:
    return PluginIdentity.parse(text) if text.startswith(PREFIX) else parse_identity(text)


Documents = Callable[[str, str, "FileSealer", SealedFiles | None], KeySource]
"""Opens a document: name, URL, what seals it, and what opened it in another process, None for none."""


class FileSealer:
    """Seals and opens key files in this process, with a call to the root for each."""

    def __init__(
        self,
        roots: Callable[[], Mapping[str, RootKey]],
        identities: Callable[[], Sequence[SealingIdentity]],
        documents: Documents,
    ) -> None:
        """``roots`` are the keys that seal, ``identities`` those of ``[kms.age] seal_identity_path``.

        Both are called when they are needed, and may raise ConfigurationError. ``documents`` opens documents
        with keys.
        """
        self._roots, self._identities, self._documents = roots, identities, documents

    def open(self, name: str, sealed: bytes) -> bytes:
        """Open a sealed file: ``SealedFiles.open``."""
        try:
            data, head = _parsed(sealed)
            bound = binding.read(head.stanzas)
            file_key = self._opened(head) if bound is None else self._unwrapped(name, head, bound)
            return sealing.open_(data, head, file_key)
        except NoMatch:
            raise ConfigurationError(
                "it is sealed for none of the identities in kms.age.seal_identity_path: name the right ones, "
                "or seal it again for one of them"
            ) from None
        except (DecryptFailed, TooLarge):
            raise ConfigurationError(
                f"it was not sealed as {name}, or by another root, or it is damaged: put the right file "
                f"there, or make one with `kms keygen --sealed-by KEY --for {name}`"
            ) from None

    def seal(self, name: str, content: bytes, root_id: str | None) -> bytes:
        """Seal content under the root key ``root_id``; None: for the first of the identities.

        It is sealed for the recipients of its recovery lines as well. Raises as ``SealedFiles.open``.
        """
        recovery = recoveries(content)
        if root_id is None:
            file_key, nonce = os.urandom(FILE_KEY_BYTES), os.urandom(header.NONCE_BYTES)
            stanzas = [each.wrap(file_key) for each in recovery]
            stanzas += _wraps(self._identities()[0], file_key)
            made = sealing.with_stanzas(stanzas, file_key, nonce, padded=False)
            return made.head + stream.seal(made.payload_key, content)
        key = self._root(root_id)
        with key.timeout():
            return sealing.seal(content, key.wrapping(TENANT), _context(name), recovery)

    def seal_again(self, name: str, content: bytes, sealed: bytes) -> bytes:
        """Seal a file under the current root: ``SealedFiles.seal_again``."""
        return self.seal(name, content, root_of(sealed))

    def document(self, name: str, url: str, opened: SealedFiles | None = None) -> KeySource:
        """Make a sealed document (``SealedFiles.document``) from one that ``opened`` opens."""
        return self._documents(name, url, self, opened)

    def _root(self, key_id: str) -> RootKey:
        try:
            return self._roots()[key_id]
        except KeyError:
            raise ConfigurationError(
                f"the settings have no key {key_id} that seals: write [kms.keys.{key_id}] with its uri and "
                'use = "seal"'
            ) from None

    def _unwrapped(self, name: str, head: Header, bound: BoundStanzas) -> bytes:
        """The file key, from the first backend of the root that answers and does not refuse us."""
        unwrap = partial(sealing.unwrap_file, head, context=_context(name), bound=bound)
        root = self._root(bound.key_id)
        found, _ = root.first_answer(TENANT, bound, unwrap, BackendUnavailable)
        return found.file_key

    def _opened(self, head: Header) -> bytes:
        """The file key, from the first identity that opens a stanza.

        Raises BackendUnavailable if none does and a plugin did not answer, else NoMatch.
        """
        away: BackendUnavailable | None = None
        for identity in self._identities():
            try:
                file_key = _first(identity, head.stanzas)
            except NoMatch:
                continue
            except BackendUnavailable as exc:
                away = exc
            else:
                head.check_mac(file_key)
                return file_key
        raise away or NoMatch


def root_of(sealed: bytes) -> str | None:
    """The root key that a sealed file names, not verified; None for one that is sealed for identities.

    Raises ConfigurationError if its header is damaged.
    """
    try:
        bound = binding.read(_parsed(sealed)[1].stanzas)
    except (DecryptFailed, TooLarge):
        raise ConfigurationError("its header is damaged: put a backup in its place") from None
    return bound.key_id if bound else None


def _parsed(sealed: bytes) -> tuple[bytes, Header]:
    """A sealed file without its armor, and its header. Raises DecryptFailed, TooLarge."""
    data = armor.dearmor(sealed) if sealed.startswith(armor.BEGIN) else sealed
    return data, header.parse(data, SYNC_LIMITS)


def recoveries(content: bytes) -> list[Recipient]:
    """The recipients of the recovery lines. Raises ConfigurationError for any other text."""
    try:
        return [parse_recipient(text.decode("ascii")) for text in _RECOVERY_LINE.findall(content)]
    except ValueError as exc:
        raise ConfigurationError(f"a recovery line names no age recipient ({exc})") from exc


def _context(name: str) -> Context:
    return Context.reserved({NAME: name})


def _first(identity: SealingIdentity, stanzas: Iterable[Stanza]) -> bytes:
    if isinstance(identity, PluginIdentity):
        return identity.unwrap_first(list(stanzas))
    for stanza in stanzas:
        try:
            return identity.unwrap(stanza)
        except NoMatch:
            continue
    raise NoMatch


def _wraps(identity: SealingIdentity, file_key: bytes) -> list[Stanza]:
    if isinstance(identity, PluginIdentity):
        return identity.wrap(file_key)
    return [identity.recipient.wrap(file_key)]

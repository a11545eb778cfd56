"""The key files of an installation, of which sealed ones are opened once for all processes of a program.

The parent opens them (the leader of the API, the worker before it forks, or a single process), and its
children read ``opened_files``. Other programs, such as ``kms doctor``, open the files themselves.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog

from kms_core import keyring, stores
from kms_core.age.header import is_age_file
from kms_core.audit.keys import CONCEALING, SIGNING
from kms_core.backends import NATIVE
from kms_core.backends.age import AgeBackend, parts_of
from kms_core.backends.age_settings import AgeSection
from kms_core.backends.key_files import KeyFiles, make_identity
from kms_core.documents.key_document import KeyDocument
from kms_core.documents.local_copy import LocalCopy
from kms_core.envelope.sealed_files import FileSealer, SealedFiles, read_identities
from kms_core.opened_files import InheritedFiles, KeyOpener
from kms_core.secure_memory import SharedSecrets
from kms_core.settings.model import Settings
from kms_core.settings.redis_urls import leaves_host
from kms_protocol import small_files
from kms_protocol.errors import Unavailable

SPOOL: Final = "kms:spool"
INTAKE: Final = "kms:intake"
_log = structlog.get_logger(__name__)


def own_files(settings: Settings) -> Mapping[str, Path]:
    """The key files of the service itself that may be sealed, by their names."""
    jobs, audit = settings.kms.jobs, settings.kms.audit
    return {
        SPOOL: jobs.spool_identity_path,
        INTAKE: jobs.intake_identity_path,
        CONCEALING: audit.key_path,
        SIGNING: audit.signing_key_path,
    }


def own_key(settings: Settings, name: str) -> AgeBackend:
    """A key of the service itself, ``SPOOL`` or ``INTAKE``. Raises ConfigurationError.

    Files under the spool key have no native stanza: only the service opens them.
    """
    path, sealed = own_files(settings)[name], of_process(settings)
    return AgeBackend(KeyFiles(path, strict=settings.is_prod, name=name, sealed=sealed), native=name != SPOOL)


def key_locations(settings: Settings) -> Mapping[str, Path | str]:
    """The private files of Age keys that take calls, or the URLs of their documents, by key id.

    Raises ConfigurationError.
    """
    section, found = settings.backend(AgeSection), dict[str, Path | str]()
    for key_id, key in settings.kms.all_keys.items():
        for parts in map(urlsplit, key.uris):
            if parts.scheme == NATIVE and key.use == "data":
                found[key_id] = parts_of(parts._replace(query=""), section)[0]
    default_id = keyring.default_key_id(settings)
    if settings.active_backend == NATIVE and default_id not in settings.kms.keys:
        found[default_id] = section.private_key_path
    return found


def documents(settings: Settings) -> Mapping[str, KeyDocument]:
    """The documents of Age keys that take calls, by key id. Raises ConfigurationError."""
    sealer, opened = direct(settings), _inherited(settings)
    return {
        name: _document(settings, name, place, sealer, opened)
        for name, place in key_locations(settings).items()
        if isinstance(place, str)
    }


def sealed_files(settings: Settings) -> Mapping[str, Path]:
    """The key files that are sealed now, by name. Raises ConfigurationError for a wrong URI."""
    paths = {**key_locations(settings), **own_files(settings)}
    files = {name: path for name, path in paths.items() if isinstance(path, Path)}
    return {name: path for name, path in files.items() if is_age_file(_content_of(path))}


def _content_of(path: Path) -> bytes:
    """The content of a file; empty if it cannot be read, which its user reports."""
    with suppress(OSError):
        return small_files.read(path)
    return b""


# -- of this process -----------------------------------------------------------------------------------

_memory: list[SharedSecrets] = []  # of this process: its own or its parent's; empty or one


def begin(settings: Settings) -> int | None:
    """Open the sealed files of a program that runs several processes, and go on in a thread.

    Makes a missing spool key in dev. Returns the descriptor that children started by an exec pass to
    ``inherit``; None without sealed files. Blocks while a root of the service's own keys is away. Raises
    ConfigurationError.
    """
    _make_spool_key(settings)
    paths = sealed_files(settings)
    if not paths and not any(isinstance(place, str) for place in key_locations(settings).values()):
        return None
    memory = SharedSecrets.create()
    opener = KeyOpener(paths, direct(settings), memory)
    opener.open_all()
    _memory[:] = [memory]
    for name, document in documents(settings).items():  # the spool key, which authenticates them, is open
        with suppress(Unavailable, OSError):  # the log says why, and the processes go on polling
            document.copy.poll()
        opener.add(name, document.private, document.sealed)
    opener.open_all()
    opener.start()
    return memory.fd


def _make_spool_key(settings: Settings) -> None:
    """Make the spool key of a new install in dev that no other host can share. Raises ConfigurationError.

    Hosts that each made their own could not read the jobs of each other.
    """
    jobs, redis = settings.kms.jobs, settings.kms.redis
    is_shared = jobs.spool_bucket or leaves_host(redis.url) or (jobs.spool_dir / "hosts").exists()
    if settings.environment == "dev" and not is_shared and make_identity(jobs.spool_identity_path):
        _log.info("key.made", name=SPOOL, path=str(jobs.spool_identity_path))


def inherit(fd: int) -> None:
    """Use what the parent opened, by the descriptor that ``begin`` returned there."""
    _memory[:] = [SharedSecrets.inherited(fd)]


def of_process(settings: Settings) -> SealedFiles:
    """The opener for this process: the parent's memory if there is one, else the roots themselves."""
    return _inherited(settings) or direct(settings)


def _inherited(settings: Settings) -> InheritedFiles | None:
    return InheritedFiles(_memory[0], direct(settings)) if _memory else None


def direct(settings: Settings) -> FileSealer:
    """Open and seal files in this process, with a call to a root for each."""
    roots = cache(partial(keyring.roots, settings))
    identities = partial(read_identities, settings.backend(AgeSection).seal_identity_path)
    return FileSealer(roots, identities, partial(_document, settings))


def _document(
    settings: Settings, name: str, url: str, sealer: FileSealer, opened: SealedFiles | None
) -> KeyDocument:
    """Its MAC key is derived from the oldest secret of the spool key, which all hosts have."""
    secret = own_key(settings, SPOOL).secrets()[0]
    document = stores.key_document(settings, secret, name, url)
    folder = stores.documents_folder(settings)
    copy = LocalCopy(document, folder, math.inf)  # however old it is: identities are not revoked
    return KeyDocument(name, document, copy, sealer, opened)

"""A service over age keys in memory or on disk, and age files taken apart and put together, for tests."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from kms_core import scopes
from kms_core.age import header, mlkem768x25519, stream, x25519
from kms_core.age.armor import VERSION_LINE, ArmorWriter
from kms_core.age.header import FILE_LIMITS, Header, Stanza
from kms_core.age.recipients import Identity
from kms_core.audit import AuditRecord, AuditWriter
from kms_core.auth.policy import AllowAll, ByScopes, Policy, Principal
from kms_core.backends import Backend
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.observability import metrics
from kms_core.payload.files import RangeSource, RangeTarget
from kms_core.payload.parallel import DEFAULTS, ParallelOptions, copy_run
from kms_core.payload.streaming import FileToFile
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable

ADA: Final = Principal("ada", "acme", "test")
NO_CONTEXT: Final = Context()
ROW_7: Final = Context.parse("row=7")
_NO_KEYS: Final[Mapping[str, Backend]] = MappingProxyType({})
NativeIdentity = x25519.X25519Identity | mlkem768x25519.HybridIdentity


def file_to_file(source: RangeSource, target: RangeTarget) -> FileToFile:
    """A file and its target, as jobs have them."""

    def copy(payload: RangeSource, at: int, options: ParallelOptions) -> None:
        copy_run(payload, target, at, options)

    return FileToFile(source, target, DEFAULTS, copy)


class BlankingTrail:
    """What trails for tests share: context values are only blanked."""

    def conceal(self, tenant: str, context: Context) -> dict[str, str]:
        del tenant
        return dict.fromkeys(context.keys, "hidden")

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        """It is always ready."""


@dataclass
class MemoryTrail(BlankingTrail):
    """An audit trail in memory: each record as the line that a file would hold."""

    lines: list[dict[str, object]] = field(default_factory=list)

    def append(self, record: AuditRecord) -> str:
        self.lines.append(msgspec.json.decode(msgspec.json.encode(record), type=dict[str, object]))
        return f"kept:{len(self.lines)}"

    @property
    def results(self) -> list[tuple[object, object]]:
        return [(line["operation"], line["result"]) for line in self.lines]


class FailingTrail(BlankingTrail):
    """An audit trail that takes nothing."""

    def append(self, record: AuditRecord) -> str:
        del record
        raise AuditUnavailable


def write_pair(
    directory: Path, *identities: NativeIdentity, current: NativeIdentity | None = None
) -> KeyFiles:
    """Both key files, as ``kms keygen`` lays them out; the last identity is in use unless one is named."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = KeyFiles(directory / "private_key.txt", directory / "public_key.txt")
    write_identities(files.private, *identities)
    write_recipient(directory / "public_key.txt", current or identities[-1])
    return files


def write_identities(path: Path, *identities: NativeIdentity) -> None:
    path.touch(mode=0o600)
    path.write_text("".join(f"{identity.export()}\n" for identity in identities))


def write_recipient(path: Path, identity: Identity) -> None:
    path.write_text(f"{identity.recipient}\n")


def age_backend(directory: Path, *identities: NativeIdentity, native: bool = True) -> AgeBackend:
    """A backend that looks at its files on every call."""
    return AgeBackend(write_pair(directory, *identities), data_keys=True, native=native, recheck_s=0)


def kms_over(  # noqa: PLR0913 -- what settings would say
    default: Backend,
    others: Mapping[str, Backend] = _NO_KEYS,
    *,
    accept_foreign: bool = True,
    trail: AuditWriter | None = None,
    policy: Policy | None = None,
    rules: SelectionRules | None = None,
) -> Kms:
    """A service whose default key is ``default``; ``others`` by their key ids."""
    keys = {
        key_id: Key(key_id, backend, accept_foreign)
        for key_id, backend in ({"default": default} | dict(others)).items()
    }
    return Kms(
        Keyring(keys, keys["default"]),
        policy or AllowAll(),
        trail or MemoryTrail(),
        rules or SelectionRules(),
    )


def allowing(*lines: str) -> ByScopes:
    """A policy by which every caller has these scopes."""
    granted = [scopes.parse(line) for line in lines]
    return ByScopes(lambda _: granted, {})


# -- files taken apart -------------------------------------------------------------------------------


def armored(file: bytes) -> bytes:
    text = io.BytesIO()
    writer = ArmorWriter(text)
    writer.write(file)
    writer.finish()
    return text.getvalue()


def head_of(file: bytes) -> Header:
    return header.parse(file, FILE_LIMITS)


def types_of(file: bytes) -> list[str]:
    return [stanza.type for stanza in head_of(file).stanzas]


def stanza_of(file: bytes, kind: str) -> Stanza:
    return next(stanza for stanza in head_of(file).stanzas if stanza.type == kind)


def stanzas_of(file: bytes) -> bytes:
    """The stanzas of a file as text, as ``Kms.unwrap`` takes them."""
    return b"".join(map(header.render_stanza, head_of(file).stanzas))


def file_key_of(file: bytes, identity: Identity) -> bytes:
    """What every recipient of a file learns, whoever that is."""
    return identity.unwrap(next(s for s in head_of(file).stanzas if s.type in {"X25519", "mlkem768x25519"}))


def with_stanzas(file: bytes, stanzas: Iterable[Stanza]) -> bytes:
    """Other stanzas under the old MAC: what somebody without the file key can do."""
    head = head_of(file)
    mac = header.b64encode(head.mac)
    return (
        VERSION_LINE
        + b"".join(map(header.render_stanza, stanzas))
        + b"--- "
        + mac
        + b"\n"
        + file[head.size :]
    )


def resigned(file: bytes, stanzas: Iterable[Stanza], file_key: bytes) -> bytes:
    """Other stanzas under a new MAC: what everybody with the file key can do."""
    return header.render(stanzas, file_key) + file[head_of(file).size :]


def forged(
    identity: Identity, key: KeyRef, context: Context, *more: Stanza, before: Iterable[Stanza] = ()
) -> bytes:
    """A file with any names and context, by somebody who knows the recipient of the identity alone."""
    file_key, nonce = os.urandom(16), os.urandom(16)
    native, bound = identity.recipient.wrap(file_key), binding.context_stanza(file_key, key, context)
    head = header.render([*before, native, bound, *more], file_key) + nonce
    return head + stream.seal(stream.payload_key(file_key, nonce), b"forged")


def is_newest(kms: Kms, file: bytes) -> bool:
    """Whether a file of the caller is as a new one of its key would be."""
    found = kms.key_version_status(ADA, head_of(file), None)
    assert found is not None
    return found.newest


def operation_counts() -> dict[tuple[str, str], int]:
    """Operations of this process by (operation, result)."""
    counts: Counter[tuple[str, str]] = Counter()
    for sample in (sample for metric in metrics.OPERATION_SECONDS.collect() for sample in metric.samples):
        if sample.name == "kms_operation_duration_seconds_count":
            counts[sample.labels["operation"], sample.labels["result"]] += int(sample.value)
    return dict(counts)

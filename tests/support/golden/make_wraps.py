"""Makes files of ``v2/``: ``PYTHONPATH=src:tests .venv/bin/python -m support.golden.make_wraps``.

``age-wraps.json``: files of age keys with ``native=false``, under the identities of ``v1/keys``.
``shared.json``: files of remote keys with ``share``, under the keys of ``v1/keys/remote.json``. Refuses where
both exist: each is made once, by the code whose formats it holds, and never again.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

from kms_core.age import header
from kms_core.age.header import FILE_LIMITS
from kms_core.backends.age import AgeBackend
from kms_core.backends.remote import RemoteBackend, SharingBackend, WrapKeys
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_protocol.context import Context
from support.golden import backends, manifest, reference
from support.golden.make_ciphertexts import ACME, BOUND, CONTEXTS, SIZES, _entry, _sealed
from support.golden.manifest import Entry

PATH: Final = manifest.V1.parent / "v2/age-wraps.json"
SHARED: Final = manifest.V1.parent / "v2/shared.json"


def main() -> int:
    if PATH.exists() and SHARED.exists():
        print("These files exist, and a golden set is never made again: see README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    if not PATH.exists():
        _write(PATH, (one for name in backends.AGE for one in _of(name)))
    if not SHARED.exists():
        _write(SHARED, (one for name in backends.REMOTE for one in _shared(name)))
    return 0


def _write(path: Path, made: Iterator[Entry]) -> None:
    path.write_text(json.dumps([one.stored() for one in made], indent=1, ensure_ascii=False) + "\n")


def sharing(name: str) -> SharingBackend:
    """A remote key of ``v1`` as ``share=5m``."""
    return SharingBackend(cast("RemoteBackend", backends.of(name)), WrapKeys(), 300.0)


def _shared(name: str) -> Iterator[Entry]:
    """Two files under one wrap key, and one of an older version."""
    backend = sharing(name)
    old, new = (version.version for version in backend.versions())
    for kind, context in CONTEXTS.items():
        yield _sealed(f"{name}/job-shared-{kind}", backend, ("acme", "payroll", new), "small", context)
    yield _sealed(f"{name}/job-shared-older", backend, ("acme", "payroll", old), "small", BOUND)


def backend_of(name: str) -> AgeBackend:
    """The age key of ``v1`` as ``native=false``."""
    return backends.age(name, native=False)


def _of(name: str) -> Iterator[Entry]:
    backend = backend_of(name)
    old, new = (version.version for version in backend.versions())
    for size in SIZES:
        for kind, context in CONTEXTS.items():
            yield _sealed(f"{name}/wrap-{size}-{kind}", backend, ("acme", "payroll", new), size, context)
    yield _sealed(f"{name}/wrap-older-version", backend, ("acme", "payroll", old), "small", BOUND)
    yield _bundle(name, backend, KeyRef(ACME.tenant, "payroll", new, "age"))


def _bundle(name: str, backend: AgeBackend, ref: KeyRef) -> Entry:
    """A file that an age tool makes with the plugin: one stanza, and a payload of the tool's own."""
    file_key, nonce = bytes(range(16)), bytes(range(16, 32))
    stanza = sealing.wrap_for_plugin(file_key, [(backend, ref)], Context.parse(BOUND))
    head = header.render([stanza], file_key) + nonce
    file = head + reference.sealed_payload(file_key, nonce, manifest.SMALL)
    assert binding.read(header.parse(file, FILE_LIMITS))
    return _entry(f"{name}/wrap-bundle", file, backend, ref, BOUND, manifest.SMALL)


if __name__ == "__main__":
    sys.exit(main())

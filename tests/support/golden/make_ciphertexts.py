"""Makes the ciphertexts of a golden set with the code of the tree; run by ``support.golden.make``.

What each is made of stands in the tables below, by hand. The file key, which the code does not show, is
unwrapped by the backend itself, and the header MAC proves it whenever a test reads the entry.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyrage

from kms_api.vault_api import models, transit
from kms_api.vault_api.transit import Extra
from kms_core.age import header
from kms_core.age.header import FILE_LIMITS
from kms_core.age.mlkem768x25519 import parse_identity
from kms_core.auth.policy import AllowAll, Principal
from kms_core.backends import Backend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_protocol.context import Context
from support.age_kms import armored, kms_over
from support.golden import backends, manifest, reference
from support.golden.manifest import Entry, b64

SIZES: Final = {
    "empty": 0,
    "byte": 1,
    "small": len(manifest.SMALL),
    "chunk": 65_536,
    "chunk-and-1": 65_537,
    "padded": 1_048_577,
}
BOUND: Final = {"env": "prod", "größe": "drei, vier = 5", "service": "api"}
CONTEXTS: Final[Mapping[str, Mapping[str, str]]] = {"plain": {}, "bound": BOUND}
ACME: Final = Principal("golden", "acme", "test")
ARMORED: Final = "age-x25519/small-bound"
SEVERAL: Final = {
    "several-transit-age": ("transit", "age-x25519"),
    "several-age-kv": ("age-mlkem768x25519", "vault-kv"),
    "several-kv-aws-transit": ("vault-kv", "awskms", "transit"),
}


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (*backends.AGE, *backends.REMOTE):
        _write(folder / f"{name}.json", _of_backend(name))
    _write(folder / "several.json", _several())
    _write(folder / "moved.json", _moved())
    _write(folder / "bundles.json", _bundles())
    _write(folder / "foreign.json", _foreign())
    _write(folder / "vault-api.json", _vault_api())
    texts = [{"entry": ARMORED, "text": armored(manifest.entry(ARMORED).file).decode()}, *_texts()]
    (folder.parent / "texts.json").write_text(json.dumps(texts, indent=1) + "\n")


def _write(path: Path, made: Iterator[Entry]) -> None:
    path.write_text(json.dumps([one.stored() for one in made], indent=1, ensure_ascii=False) + "\n")
    manifest.entries.cache_clear()


def _of_backend(name: str) -> Iterator[Entry]:
    backend = backends.of(name)
    old, new = (version.version for version in backend.versions())
    for size in SIZES:
        for kind, context in CONTEXTS.items():
            yield _sealed(f"{name}/{size}-{kind}", backend, ("acme", "payroll", new), size, context)
    yield _sealed(f"{name}/older-version", backend, ("acme", "payroll", old), "small", BOUND)
    yield _sealed(f"{name}/default-key", backend, ("default", "default", new), "small", {})
    if name in backends.REMOTE:
        job = backend.for_job()
        for kind, context in CONTEXTS.items():
            yield _sealed(f"{name}/job-{kind}", job, ("acme", "payroll", new), "small", context)


def _sealed(
    name: str, backend: Backend, names: tuple[str, str, str], size: str, context: Mapping[str, str]
) -> Entry:
    tenant, key_id, version = names
    ref = KeyRef(tenant, key_id, version, backend.name)
    data = manifest.plaintext(SIZES[size])
    file = sealing.seal(data, [(backend, ref)], Context.parse(context))
    return _entry(name, file, backend, ref, context, data)


def _entry(  # noqa: PLR0913, PLR0917 -- what an entry says
    name: str,
    file: bytes,
    backend: Backend,
    ref: KeyRef,
    context: Mapping[str, str],
    data: bytes,
    *,
    wraps: tuple[str, ...] = (),
    origin: str = "service",
) -> Entry:
    head = header.parse(file, FILE_LIMITS)
    return Entry(
        name=name,
        backend=wraps[0] if wraps else name.partition("/")[0],
        tenant=ref.tenant,
        key_id=ref.key_id,
        version=ref.version,
        context=context,
        size=len(data),
        origin=origin,
        file_key=_file_key(head, backend, ref, context),
        head=file[: head.payload_offset],
        sha256=hashlib.sha256(file).hexdigest(),
        wraps=wraps,
        clear=b"" if data == manifest.plaintext(len(data)) else data,
    )


def _file_key(head: header.Header, backend: Backend, ref: KeyRef, context: Mapping[str, str]) -> bytes:
    bound = binding.read(head)
    if bound is None:
        return sealing.foreign_file_key(head, backend, [ref])[0]
    made = Context.reserved(context) if any(map(_is_reserved, context)) else Context.parse(context)
    return sealing.file_key_of(head, backend, ref, context=made, bound=bound)


def _is_reserved(key: str) -> bool:
    return key.startswith("kms:")


def _kms(*names: str) -> Kms:
    """A service of one key ``payroll``, with these backends in this order."""
    first, *others = map(backends.of, names)
    key = Key("payroll", first, accept_foreign=True, others=tuple(others))
    return Kms(Keyring({"payroll": key}, key), AllowAll(), kms_over(first).audit_log, kms_over(first)._rules)  # noqa: SLF001 -- the rules of tests


def _several() -> Iterator[Entry]:
    for name, wrapping in SEVERAL.items():
        kms = _kms(*wrapping)
        file, ref = _pair(kms.encrypt(ACME, manifest.SMALL, Context.parse(BOUND)))
        yield _entry(
            f"{name}/small-bound", file, backends.of(wrapping[0]), ref, BOUND, manifest.SMALL, wraps=wrapping
        )


def _pair(made: object) -> tuple[bytes, KeyRef]:
    ciphertext: bytes = made.ciphertext  # type: ignore[attr-defined]  # Sealed and DataKey alike
    key: KeyRef = made.key  # type: ignore[attr-defined]  # as above
    return ciphertext, key


def _moved() -> Iterator[Entry]:
    """Rewrapped (same payload, new header, new context), resealed, and data keys."""
    new = {"env": "archive"}
    for name in ("age-x25519", "transit"):
        kms, backend = _kms(name), backends.of(name)
        old = manifest.entry(f"{name}/older-version")
        for word, move in (("rewrapped", kms.rewrap), ("resealed", kms.reseal)):
            file, ref = _pair(move(ACME, old.file, Context.parse(BOUND), new_context=Context.parse(new)))
            yield _entry(f"{name}/{word}", file, backend, ref, new, manifest.SMALL, wraps=(name,))
        made = kms.generate_data_key(ACME, 32, Context.parse(BOUND)) if name == "age-x25519" else None
        if made is not None:
            yield _entry(
                f"{name}/data-key", made.ciphertext, backend, made.key, BOUND, made.plaintext, wraps=(name,)
            )


def _bundles() -> Iterator[Entry]:
    """Our bundle in a header and before a payload that an age tool made."""
    for name in ("age-x25519", "transit"):
        file_key, nonce = os.urandom(16), os.urandom(16)
        made = _kms(name).wrap(ACME, file_key, Context.parse(BOUND))
        stanza = next(reference.stanzas_of(made.stanza))
        grease = reference.Stanza(("golden-grease", "1"), b"ignored")
        head = reference.header_of([grease, stanza], file_key)
        file = head + nonce + reference.sealed_payload(file_key, nonce, manifest.SMALL)
        yield _entry(
            f"{name}/bundle", file, backends.of(name), made.key, BOUND, manifest.SMALL, wraps=(name,)
        )


def _foreign() -> Iterator[Entry]:
    """By pyrage, which knows nothing of the service."""
    backend = backends.of("age-x25519")
    text = (manifest.V1 / "keys/age-x25519.txt").read_text()
    mine = parse_identity(text.splitlines()[-1]).recipient
    recipients = [pyrage.x25519.Identity.generate().to_public(), pyrage.x25519.Recipient.from_str(str(mine))]
    file = pyrage.encrypt(manifest.SMALL, recipients)
    ref = KeyRef("acme", "payroll", backend.current_version(), "age")
    yield _entry(
        "age-x25519/foreign", file, backend, ref, {}, manifest.SMALL, origin="foreign", wraps=("age-x25519",)
    )


VAULT: Final[Mapping[str, Extra]] = {
    "plain": Extra(),
    "context": Extra(context=b"acme payroll"),
    "both": Extra(context=b"acme payroll", associated_data=b"row 7"),
}


def _vault_api() -> Iterator[Entry]:
    kms, backend = _kms("age-x25519"), backends.of("age-x25519")
    for name, extra in VAULT.items():
        sealed, number = transit.encrypt_bound(kms, ACME, manifest.SMALL, extra, key_id="payroll")
        given = {"kms:transit.context": extra.context, "kms:transit.associated_data": extra.associated_data}
        context = {"kms:transit": f"v{number}"} | {key: b64(value) for key, value in given.items() if value}
        yield _entry(
            f"vault-api/{name}",
            sealed.ciphertext,
            backend,
            sealed.key,
            context,
            manifest.SMALL,
            wraps=("age-x25519",),
        )


def _texts() -> Iterator[Mapping[str, str]]:
    for name in VAULT:
        one = manifest.entry(f"vault-api/{name}")
        number = int(one.context["kms:transit"].removeprefix("v"))
        yield {"entry": one.name, "text": models.render(number, one.file)}

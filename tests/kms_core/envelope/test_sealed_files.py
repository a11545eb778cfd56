"""Key files sealed under a root: what opens them, and what may not stand in their place."""

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from kms_core.age.header import Stanza, is_age_file
from kms_core.backends import Backend
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.envelope.sealed_files import (
    NAME,
    RECOVERY,
    TENANT,
    FileSealer,
    SealingIdentity,
    read_identities,
    root_of,
)
from kms_core.keyring import Key
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, ConfigurationError, InvalidContext
from support import programs, sealing_plugin
from support.age_kms import (
    age_backend,
    armored,
    forged,
    stanza_of,
    types_of,
    with_stanzas,
    write_identities,
)
from support.documents import no_documents
from support.memory_kms import memory_backend

CONTENT: Final = b"AGE-SECRET-KEY-1TEST\n"


@pytest.fixture
def root(tmp_path: Path) -> AgeBackend:
    return age_backend(tmp_path / "root", x25519.X25519Identity.generate())


def sealer(root: Backend, *identities: SealingIdentity, key_id: str = "root") -> FileSealer:
    return FileSealer(lambda: {key_id: Key(key_id, root)}, lambda: identities, no_documents)


def refusal(opener: FileSealer, name: str, sealed: bytes) -> str:
    with pytest.raises(ConfigurationError) as raised:
        opener.open(name, sealed)
    return raised.value.detail


def stock_age(content: bytes, *words: str) -> bytes:
    argv = [programs.program("age"), *words]
    return subprocess.run(argv, input=content, capture_output=True, check=True, timeout=60).stdout


def test_a_root_opens_what_it_sealed_also_after_its_rotation(root: AgeBackend) -> None:
    sealed = sealer(root).seal("payroll", CONTENT, "root")

    assert sealer(root).open("payroll", sealed) == CONTENT
    assert sealer(root).open("payroll", armored(sealed)) == CONTENT
    assert (is_age_file(sealed), root_of(sealed), root_of(armored(sealed))) == (True, "root", "root")
    assert CONTENT not in sealed
    root.rotate()
    again = sealer(root).seal_again("payroll", CONTENT + b"more\n", sealed)
    assert sealer(root).open("payroll", sealed) == CONTENT
    assert sealer(root).open("payroll", again) == CONTENT + b"more\n"


def test_a_root_of_two_backends_opens_it_while_one_is_away(root: AgeBackend) -> None:
    remote, peer = memory_backend()
    both = FileSealer(lambda: {"root": Key("root", remote, others=(root,))}, list, no_documents)
    sealed = both.seal("a", CONTENT, "root")
    peer.cut()

    assert both.open("a", sealed) == CONTENT
    with pytest.raises(BackendUnavailable, match="cut off"):
        sealer(remote).open("a", sealed)
    peer.trouble = None
    assert sealer(remote).open("a", sealed) == CONTENT


def test_a_file_for_another_key_is_refused(root: AgeBackend) -> None:
    sealed = sealer(root).seal("payroll", CONTENT, "root")

    assert "was not sealed as hr" in refusal(sealer(root), "hr", sealed)
    assert "was not sealed as kms:spool" in refusal(sealer(root), "kms:spool", sealed)


def test_a_file_of_another_tenant_is_refused(root: AgeBackend) -> None:
    """Made with every right of a caller: the root's own key id, and the very context."""
    ref = KeyRef("acme", "root", root.versions()[-1].version, root.name)
    theirs = sealing.seal(CONTENT, [(root, ref)], Context.reserved({"kms:sealed": "payroll"}))

    assert "was not sealed as payroll" in refusal(sealer(root), "payroll", theirs)


def test_a_file_in_another_context_is_refused(root: AgeBackend) -> None:
    ref = KeyRef(TENANT, "root", root.versions()[-1].version, root.name)
    other = sealing.seal(CONTENT, [(root, ref)], Context.parse("sealed=payroll"))

    assert "was not sealed as payroll" in refusal(sealer(root), "payroll", other)


def test_no_caller_gives_that_context_or_tenant() -> None:
    with pytest.raises(InvalidContext):
        Context.parse("kms:sealed=payroll")
    assert ":" in TENANT  # KeyId, the type of tenants in settings and tokens, has none


def test_no_other_key_is_its_root(root: AgeBackend, tmp_path: Path) -> None:
    sealed = sealer(root).seal("payroll", CONTENT, "root")
    other = age_backend(tmp_path / "other", x25519.X25519Identity.generate())

    assert "by another root" in refusal(sealer(other), "payroll", sealed)
    assert '[kms.keys.root] with its uri and use = "seal"' in refusal(
        sealer(root, key_id="other"), "payroll", sealed
    )


@pytest.mark.parametrize("at", [0, 30, 100, -1])
def test_a_damaged_file_is_refused(root: AgeBackend, at: int) -> None:
    sealed = bytearray(sealer(root).seal("payroll", CONTENT, "root"))
    sealed[at] ^= 1
    if not is_age_file(bytes(sealed)):
        return

    with pytest.raises(ConfigurationError):
        sealer(root).open("payroll", bytes(sealed))


def test_a_stanza_of_another_file_is_refused(root: AgeBackend) -> None:
    first, second = (sealer(root).seal(name, CONTENT, "root") for name in ("payroll", "hr"))
    mixed = with_stanzas(first, [stanza_of(second, kind) for kind in types_of(second)])

    assert "was not sealed" in refusal(sealer(root), "payroll", mixed)


def test_a_file_that_the_recipient_of_the_root_is_enough_for_is_refused(tmp_path: Path) -> None:
    identity = x25519.X25519Identity.generate()
    root = age_backend(tmp_path, identity)
    key = KeyRef(TENANT, "root", root.versions()[-1].version, "age")
    for more in ([], [binding.wrap_stanza(key, b"!")], [Stanza((binding.ORIGIN, "1"), bytes(32))]):
        made = forged(identity, key, Context.reserved({NAME: "payroll"}), *more)

        assert "was not sealed" in refusal(sealer(root, identity), "payroll", made)


def test_a_recovery_recipient_opens_it_with_stock_age(root: AgeBackend, tmp_path: Path) -> None:
    offline = x25519.X25519Identity.generate()
    content = f"{RECOVERY}{offline.recipient}\n".encode() + CONTENT
    sealed = sealer(root).seal("payroll", content, "root")
    again = sealer(root).seal_again("payroll", content + b"more\n", sealed)
    write_identities(tmp_path / "offline.txt", offline)

    for file, expected in ((sealed, content), (again, content + b"more\n")):
        assert stock_age(file, "-d", "-i", str(tmp_path / "offline.txt")) == expected
        assert sealer(root).open("payroll", file) == expected


def test_a_recovery_line_that_names_no_recipient_is_refused(root: AgeBackend) -> None:
    with pytest.raises(ConfigurationError, match="recovery line"):
        sealer(root).seal("payroll", b"# recovery: age1nobody\n", "root")


# -- identities --------------------------------------------------------------------------------------


def test_stock_age_seals_for_an_identity(tmp_path: Path, root: AgeBackend) -> None:
    credential = x25519.X25519Identity.generate()
    sealed = stock_age(CONTENT, "-a", "-r", str(credential.recipient))
    write_identities(tmp_path / "credential", x25519.X25519Identity.generate(), credential)
    opener = sealer(root, *read_identities(tmp_path / "credential"))

    assert (root_of(sealed), opener.open("payroll", sealed)) == (None, CONTENT)
    assert opener.open("payroll", sealer(root, credential).seal("payroll", CONTENT, None)) == CONTENT
    assert "none of the identities" in refusal(
        sealer(root, x25519.X25519Identity.generate()), "payroll", sealed
    )


def test_a_changed_header_is_refused(root: AgeBackend) -> None:
    credential = x25519.X25519Identity.generate()
    sealed = sealer(root, credential).seal("payroll", CONTENT, None)
    more = with_stanzas(sealed, [stanza_of(sealed, "X25519"), Stanza(("another",), b"")])

    assert "damaged" in refusal(sealer(root, credential), "payroll", more)


def test_a_plugin_opens_and_seals(tmp_path: Path, root: AgeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{sealing_plugin.install(tmp_path / 'bin')}:{os.environ['PATH']}")
    identities = tmp_path / "identities"
    identities.write_text(f"# of a token\n{sealing_plugin.identity()}\n")
    opener = sealer(root, *read_identities(identities))
    sealed = opener.seal("payroll", CONTENT, None)

    assert opener.open("payroll", sealed) == CONTENT
    assert stock_age(sealed, "-d", "-i", str(identities)) == CONTENT


def test_a_plugin_with_a_wrong_file_key_is_refused(
    tmp_path: Path, root: AgeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{sealing_plugin.install(tmp_path / 'bin')}:{os.environ['PATH']}")
    for mode in ("good", "other-key"):
        (tmp_path / mode).write_text(sealing_plugin.identity(mode))
    sealed = sealer(root, *read_identities(tmp_path / "good")).seal("payroll", CONTENT, None)

    assert "damaged" in refusal(sealer(root, *read_identities(tmp_path / "other-key")), "payroll", sealed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"kms\.age\.seal_identity_path"),
        ("", "holds no age identity"),
        ("# nothing\n", "holds no age identity"),
        ("\nhello\n", "Line 2"),
        ("AGE-PLUGIN-X-1QQQQ", "Line 1"),
    ],
)
def test_a_file_without_identities_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "identities").write_text(text)

    with pytest.raises(ConfigurationError, match=said):
        read_identities(tmp_path / "identities")

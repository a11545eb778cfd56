"""``kms seal -i`` and ``kms open``: files bound to a context, exchanged with the service."""

import pytest

from kms_client import Client
from kms_core.age import mlkem768x25519, x25519
from kms_core.age.header import FILE_LIMITS, parse
from kms_core.auth.policy import Principal
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef, version_of
from kms_protocol.context import Context
from support.age_kms import forged, kms_over
from support.cli.fixtures import RunningService
from support.cli.offline import Workspace, write_key

MIB = 1024 * 1024
PROD = "env=prod,service=api"


def sealed_at(workspace: Workspace, context: str = PROD, given: bytes = b"salary") -> bytes:
    return workspace.stdout_of("seal", "-i", "key.txt", "--context", context, given=given)


# -- with the service --------------------------------------------------------------------------------


def test_the_command_and_the_service_open_what_the_other_sealed(
    workspace: Workspace, real_service: RunningService
) -> None:
    key = str(real_service.state_dir / "age" / "private_key.txt")
    ours = workspace.stdout_of("seal", "-i", key, "--context", PROD, given=b"salary")
    with Client(real_service.url) as service:
        opened = service.decrypt(ours, context={"service": "api", "env": "prod"})
        theirs = service.encrypt(b"salary", context=PROD).ciphertext

    assert (opened.plaintext, opened.origin) == (b"salary", "service")
    assert workspace.stdout_of("open", "-i", key, "--context", PROD, given=theirs) == b"salary"
    assert workspace.kms("open", "-i", key, given=theirs).returncode == 65


# -- the context -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "asked", "code"),
    [
        (PROD, '{"service": "api", "env": "prod"}', 0),
        ("", "", 0),
        (PROD, "", 65),
        (PROD, "env=prod", 65),
        (PROD, f"{PROD},x=y", 65),
        (PROD, "env=dev,service=api", 65),
        ("", "env=prod", 65),
    ],
    ids=["json", "none", "none of some", "less", "more", "other", "some for none"],
)
def test_only_the_same_context_opens_and_break_glass_opens_all(
    workspace: Workspace, context: str, asked: str, code: int
) -> None:
    sealed = sealed_at(workspace, context)
    done = workspace.kms("open", "-i", "key.txt", "--context", asked, "-o", "out", given=sealed)
    broken = workspace.kms("open", "-i", "key.txt", "--break-glass", given=sealed)

    assert (done.returncode, workspace.has("out")) == (code, code == 0)
    assert broken.stdout == b"salary"
    assert b"kms: warning: --break-glass: context and origin of the file are not checked" in broken.stderr


def test_break_glass_still_wants_every_byte_genuine(workspace: Workspace) -> None:
    sealed = bytearray(sealed_at(workspace, given=bytes(100_000)))
    for at in (150, len(sealed) - 1):
        sealed[at] ^= 1
        done = workspace.kms("open", "-i", "key.txt", "--break-glass", "-o", "out", given=bytes(sealed))
        sealed[at] ^= 1

        assert (done.returncode, workspace.has("out")) == (65, False)


def test_a_file_bound_to_nothing_is_refused_where_a_context_is_asked_for(workspace: Workspace) -> None:
    sealed = workspace.stdout_of("seal", "-r", workspace.recipient, given=b"salary")
    done = workspace.kms("open", "-i", "key.txt", "--context", PROD, given=sealed)

    assert (done.returncode, done.stdout) == (65, b"")
    assert b"not bound to a context" in done.stderr


@pytest.mark.parametrize("is_native", [True, False], ids=["beside a native stanza", "alone"])
def test_a_wrap_that_opens_nothing_proves_no_origin(workspace: Workspace, is_native: bool) -> None:
    key = KeyRef("default", "default", version_of(workspace.identity.recipient), "age")
    wrap = binding.wrap_stanza(key, b"!")
    other = workspace.identity if is_native else x25519.X25519Identity.generate()
    done = workspace.kms(
        "open", "-i", "key.txt", "--context", PROD, given=forged(other, key, Context.parse(PROD), wrap)
    )

    assert (done.returncode, done.stdout) == (65, b"")


def test_a_context_past_its_time_opens_nothing(workspace: Workspace) -> None:
    past, future = ("not_after=2020-01-01T00:00:00Z", "not_after=2999-01-01T00:00:00Z")
    over = workspace.kms("open", "-i", "key.txt", "--context", past, given=sealed_at(workspace, past))
    opened = workspace.stdout_of(
        "open", "-i", "key.txt", "--context", future, given=sealed_at(workspace, future)
    )

    assert (over.returncode, over.stdout, opened) == (65, b"", b"salary")
    assert workspace.kms("seal", "-i", "key.txt", "--context", "not_after=soon").returncode == 65


# -- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [x25519.X25519Identity, mlkem768x25519.HybridIdentity], ids=["x25519", "hybrid"]
)
def test_the_last_identity_of_a_file_seals_and_any_opens(
    workspace: Workspace, kind: type[x25519.X25519Identity] | type[mlkem768x25519.HybridIdentity]
) -> None:
    newer = kind.generate()
    older = sealed_at(workspace)
    write_key(workspace.key, workspace.identity, newer)
    newest = sealed_at(workspace)

    assert f" {version_of(newer.recipient)} ".encode() in newest
    for sealed in (older, newest):
        assert workspace.stdout_of("open", "-i", "key.txt", "--context", PROD, given=sealed) == b"salary"


def test_a_key_version_that_is_not_at_hand_is_named(workspace: Workspace) -> None:
    sealed = sealed_at(workspace)
    version = version_of(workspace.identity.recipient)
    write_key(workspace.key, x25519.X25519Identity.generate())
    done = workspace.kms("open", "-i", "key.txt", "--context", PROD, given=sealed)

    assert done.returncode == 65
    assert f"key version {version}".encode() in done.stderr


def test_the_key_id_is_in_the_file_and_checked(workspace: Workspace) -> None:
    sealed = workspace.stdout_of("seal", "-i", "key.txt", "--key-id", "payroll", given=b"salary")

    assert b" payroll " in sealed
    assert workspace.stdout_of("open", "-i", "key.txt", given=sealed) == b"salary"
    assert workspace.kms("seal", "-i", "key.txt", "--key-id", "pay roll").returncode == 65


# -- the pad -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "padded"), [(MIB - 1, False), (MIB, True), (MIB + 1, True)])
def test_the_header_fills_4_kib_from_1_mib_on(workspace: Workspace, size: int, padded: bool) -> None:
    workspace.write("in", bytes(size))
    for source, given in (("in", b""), ("-", bytes(size))):
        sealed = workspace.stdout_of("seal", "-i", "key.txt", source, given=given)

        assert (parse(sealed, FILE_LIMITS).size == 4096) == padded
        assert workspace.stdout_of("open", "-i", "key.txt", given=sealed) == bytes(size)


# -- files without a native stanza (native=false) ----------------------------------------------------


def wrapped(workspace: Workspace, tenant: str) -> bytes:
    """What a service whose age key says ``native=false`` makes with the key file of the workspace."""
    backend = AgeBackend(KeyFiles(workspace.folder / "key.txt"), native=False)
    ada = Principal("ada", tenant, "test")
    return kms_over(backend).encrypt(ada, b"salary", Context.parse(PROD)).ciphertext


def test_a_file_without_a_native_stanza_opens_with_its_key_and_context(workspace: Workspace) -> None:
    sealed = wrapped(workspace, "default")
    write_key(workspace.folder / "other.txt", x25519.X25519Identity.generate())

    assert workspace.stdout_of("open", "-i", "key.txt", "--context", PROD, given=sealed) == b"salary"
    assert workspace.stdout_of("open", "-i", "key.txt", "--break-glass", given=sealed) == b"salary"
    assert workspace.kms("open", "-i", "key.txt", "--context", "env=dev", given=sealed).returncode == 65
    assert workspace.kms("open", "-i", "other.txt", "--break-glass", given=sealed).returncode == 65


def test_a_file_of_another_tenant_opens_where_that_is_named(workspace: Workspace) -> None:
    """Its wrap binds the tenant, so that even --break-glass needs it."""
    sealed = wrapped(workspace, "acme")
    for asked in (["--context", PROD], ["--break-glass"]):
        refused = workspace.kms("open", "-i", "key.txt", *asked, given=sealed)
        named = workspace.stdout_of("open", "-i", "key.txt", "--tenant", "acme", *asked, given=sealed)

        assert (refused.returncode, named) == (65, b"salary")
        assert b"--tenant" in refused.stderr or "--break-glass" not in asked

"""``kms seal -i`` and ``kms open``: files bound to a context, exchanged with the service and stock age."""

import base64
import os
from pathlib import Path

import httpx2 as httpx
import pyrage
import pytest

from kms_cli.age_files import Identities
from kms_core.age import mlkem768x25519, x25519
from kms_core.age.header import FILE_LIMITS, parse
from kms_core.age.mlkem768x25519 import version_of
from kms_core.auth.policy import Principal
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope import sealing
from kms_core.envelope.binding import KeyRef
from kms_protocol.context import Context
from kms_protocol.wire import PREFIX
from support.age_kms import kms_over
from support.cli.fixtures import Place
from support.cli.offline import Workspace, workspace, write_key

MIB = 1024 * 1024
PROD = "env=prod,service=api"


@pytest.fixture(name="workspace")
def a_desk(tmp_path: Path) -> Workspace:
    return workspace(tmp_path)


def sealed_at(workspace: Workspace, context: str = PROD, given: bytes = b"salary") -> bytes:
    return workspace.made("seal", "-i", "key.txt", "--context", context, given=given)


# -- with the service --------------------------------------------------------------------------------


def test_the_service_opens_what_was_sealed_with_its_key(workspace: Workspace, real_service: Place) -> None:
    key = str(real_service.state_dir / "age" / "private_key.txt")
    sealed = workspace.made("seal", "-i", key, "--context", PROD, given=b"salary")
    body = {"ciphertext": base64.b64encode(sealed).decode(), "context": {"service": "api", "env": "prod"}}
    answer = httpx.post(f"{real_service.url}{PREFIX}/decrypt", json=body, trust_env=False)

    assert answer.status_code == 200
    assert base64.b64decode(answer.json()["plaintext"]) == b"salary"
    assert answer.json()["origin"] == "service"


def test_what_the_service_sealed_is_opened_without_it(workspace: Workspace, real_service: Place) -> None:
    key = str(real_service.state_dir / "age" / "private_key.txt")
    body = {"plaintext": base64.b64encode(b"salary").decode(), "context": PROD}
    answer = httpx.post(f"{real_service.url}{PREFIX}/encrypt", json=body, trust_env=False)
    sealed = base64.b64decode(answer.json()["ciphertext"])

    assert workspace.made("open", "-i", key, "--context", PROD, given=sealed) == b"salary"
    assert workspace.kms("open", "-i", key, given=sealed).returncode == 65


# -- the context -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "asked"),
    [
        (PROD, ["--context", "service=api,env=prod"]),
        (PROD, ["--context", '{"env": "prod", "service": "api"}']),
        ("", []),
        ("", ["--context", ""]),
    ],
    ids=["other order", "json", "none", "empty"],
)
def test_the_same_context_opens(workspace: Workspace, context: str, asked: list[str]) -> None:
    assert workspace.made("open", "-i", "key.txt", *asked, given=sealed_at(workspace, context)) == b"salary"


@pytest.mark.parametrize(
    ("context", "asked"),
    [(PROD, ""), (PROD, "env=prod"), (PROD, f"{PROD},x=y"), (PROD, "env=dev,service=api"), ("", "env=prod")],
    ids=["none", "less", "more", "other", "some for none"],
)
def test_another_context_opens_nothing_and_break_glass_opens_all(
    workspace: Workspace, context: str, asked: str
) -> None:
    sealed = sealed_at(workspace, context)
    done = workspace.kms("open", "-i", "key.txt", "--context", asked, "-o", "out", given=sealed)
    broken = workspace.kms("open", "-i", "key.txt", "--break-glass", given=sealed)

    assert (done.returncode, workspace.has("out")) == (65, False)
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
    sealed = workspace.made("seal", "-r", workspace.recipient, given=b"salary")
    done = workspace.kms("open", "-i", "key.txt", "--context", PROD, given=sealed)

    assert (done.returncode, done.stdout) == (65, b"")
    assert b"not bound to a context" in done.stderr


def test_a_context_past_its_time_opens_nothing(workspace: Workspace) -> None:
    past, future = ("not_after=2020-01-01T00:00:00Z", "not_after=2999-01-01T00:00:00Z")

    assert (
        workspace.made("open", "-i", "key.txt", "--context", future, given=sealed_at(workspace, future))
        == b"salary"
    )
    done = workspace.kms("open", "-i", "key.txt", "--context", past, given=sealed_at(workspace, past))
    assert (done.returncode, done.stdout) == (65, b"")
    assert workspace.kms("seal", "-i", "key.txt", "--context", "not_after=soon").returncode == 65


# -- the origin --------------------------------------------------------------------------------------


class NoOrigin(Identities):
    """Who knows the recipient only, and leaves the origin out."""

    def origin_key(self, key: KeyRef) -> bytes | None:  # type: ignore[override]  # that is the point
        del key
        return None


class FalseOrigin(Identities):
    """Who knows the recipient only, and makes an origin up."""

    def origin_key(self, key: KeyRef) -> bytes:
        del key
        return os.urandom(32)


@pytest.mark.parametrize("forger", [NoOrigin, FalseOrigin])
def test_a_file_that_others_bound_to_a_context_is_refused(
    workspace: Workspace, forger: type[Identities]
) -> None:
    version = version_of(workspace.identity.recipient)
    others = forger({version: workspace.identity})
    forged = sealing.seal(b"raise", [(others, others.ref(version))], Context.parse(PROD))
    done = workspace.kms("open", "-i", "key.txt", "--context", PROD, given=forged)

    assert (done.returncode, done.stdout) == (65, b"")
    assert workspace.made("open", "-i", "key.txt", "--break-glass", given=forged) == b"raise"


# -- keys --------------------------------------------------------------------------------------------


def test_stock_age_opens_a_bound_file(workspace: Workspace) -> None:
    identity = pyrage.x25519.Identity.from_str(workspace.identity.export())

    assert pyrage.decrypt(sealed_at(workspace), [identity]) == b"salary"


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
        assert workspace.made("open", "-i", "key.txt", "--context", PROD, given=sealed) == b"salary"


def test_a_key_version_that_is_not_at_hand_is_named(workspace: Workspace) -> None:
    sealed = sealed_at(workspace)
    version = version_of(workspace.identity.recipient)
    write_key(workspace.key, x25519.X25519Identity.generate())
    done = workspace.kms("open", "-i", "key.txt", "--context", PROD, given=sealed)

    assert done.returncode == 65
    assert f"key version {version}".encode() in done.stderr


def test_the_key_id_is_in_the_file_and_checked(workspace: Workspace) -> None:
    sealed = workspace.made("seal", "-i", "key.txt", "--key-id", "payroll", given=b"salary")

    assert b" payroll " in sealed
    assert workspace.made("open", "-i", "key.txt", given=sealed) == b"salary"
    assert workspace.kms("seal", "-i", "key.txt", "--key-id", "pay roll").returncode == 65


# -- the pad -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "padded"), [(MIB - 1, False), (MIB, True), (MIB + 1, True)])
def test_the_header_fills_4_kib_from_1_mib_on(workspace: Workspace, size: int, padded: bool) -> None:
    workspace.write("in", bytes(size))
    for sealed in (
        workspace.made("seal", "-i", "key.txt", "in"),
        workspace.made("seal", "-i", "key.txt", given=bytes(size)),
    ):
        assert (parse(sealed, FILE_LIMITS).size == 4096) == padded
        assert workspace.made("open", "-i", "key.txt", given=sealed) == bytes(size)


# -- files without a native stanza (native=false) ----------------------------------------------------


def wrapped(workspace: Workspace, tenant: str) -> bytes:
    """What a service whose age key says ``native=false`` makes with the key file of the workspace."""
    backend = AgeBackend(KeyFiles(workspace.folder / "key.txt"), native=False)
    return (
        kms_over(backend).encrypt(Principal("ada", tenant, "test"), b"salary", Context.parse(PROD)).ciphertext
    )


def test_a_file_without_a_native_stanza_opens_with_its_context(workspace: Workspace) -> None:
    sealed = wrapped(workspace, "default")

    assert workspace.made("open", "-i", "key.txt", "--context", PROD, given=sealed) == b"salary"
    assert workspace.kms("open", "-i", "key.txt", "--context", "env=dev", given=sealed).returncode == 65
    assert workspace.made("open", "-i", "key.txt", "--break-glass", given=sealed) == b"salary"


def test_a_file_of_another_tenant_opens_where_that_is_named(workspace: Workspace) -> None:
    """Its wrap binds the tenant, so that even --break-glass needs it."""
    sealed = wrapped(workspace, "acme")
    for asked in (["--context", PROD], ["--break-glass"]):
        refused = workspace.kms("open", "-i", "key.txt", *asked, given=sealed)
        named = workspace.made("open", "-i", "key.txt", "--tenant", "acme", *asked, given=sealed)

        assert (refused.returncode, named) == (65, b"salary")
        assert b"--tenant" in refused.stderr or "--break-glass" not in asked


def test_another_identity_opens_no_such_file(workspace: Workspace) -> None:
    sealed = wrapped(workspace, "default")
    write_key(workspace.folder / "other.txt", x25519.X25519Identity.generate())

    assert workspace.kms("open", "-i", "other.txt", "--break-glass", given=sealed).returncode == 65

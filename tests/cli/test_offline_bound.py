"""``kms seal -i`` and ``kms open``: files bound to a context, exchanged with the service and stock age."""

import base64
import os
from pathlib import Path

import httpx
import pyrage
import pytest

from cli.conftest import Place
from cli.keyed import Desk, desk, write_key
from kms_cli.age_file.keys import Identities
from kms_core.age import mlkem768x25519, x25519
from kms_core.age.header import FILE_LIMITS, parse
from kms_core.age.recipients import version_of
from kms_core.envelope import sealing
from kms_core.envelope.binding import KeyRef
from kms_protocol.context import Context
from kms_protocol.wire import PREFIX

MIB = 1024 * 1024
PROD = "env=prod,service=api"


@pytest.fixture(name="desk")
def a_desk(tmp_path: Path) -> Desk:
    return desk(tmp_path)


def sealed_at(desk: Desk, context: str = PROD, given: bytes = b"salary") -> bytes:
    return desk.made("seal", "-i", "key.txt", "--context", context, given=given)


# -- with the service --------------------------------------------------------------------------------


def test_the_service_opens_what_was_sealed_with_its_key(desk: Desk, real_service: Place) -> None:
    key = str(real_service.state_dir / "age" / "private_key.txt")
    sealed = desk.made("seal", "-i", key, "--context", PROD, given=b"salary")
    body = {"ciphertext": base64.b64encode(sealed).decode(), "context": {"service": "api", "env": "prod"}}
    answer = httpx.post(f"{real_service.url}{PREFIX}/decrypt", json=body, trust_env=False)

    assert answer.status_code == 200
    assert base64.b64decode(answer.json()["plaintext"]) == b"salary"
    assert answer.json()["origin"] == "service"


def test_what_the_service_sealed_is_opened_without_it(desk: Desk, real_service: Place) -> None:
    key = str(real_service.state_dir / "age" / "private_key.txt")
    body = {"plaintext": base64.b64encode(b"salary").decode(), "context": PROD}
    answer = httpx.post(f"{real_service.url}{PREFIX}/encrypt", json=body, trust_env=False)
    sealed = base64.b64decode(answer.json()["ciphertext"])

    assert desk.made("open", "-i", key, "--context", PROD, given=sealed) == b"salary"
    assert desk.kms("open", "-i", key, given=sealed).returncode == 65


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
def test_the_same_context_opens(desk: Desk, context: str, asked: list[str]) -> None:
    assert desk.made("open", "-i", "key.txt", *asked, given=sealed_at(desk, context)) == b"salary"


@pytest.mark.parametrize(
    ("context", "asked"),
    [(PROD, ""), (PROD, "env=prod"), (PROD, f"{PROD},x=y"), (PROD, "env=dev,service=api"), ("", "env=prod")],
    ids=["none", "less", "more", "other", "some for none"],
)
def test_another_context_opens_nothing_and_break_glass_opens_all(
    desk: Desk, context: str, asked: str
) -> None:
    sealed = sealed_at(desk, context)
    done = desk.kms("open", "-i", "key.txt", "--context", asked, "-o", "out", given=sealed)
    broken = desk.kms("open", "-i", "key.txt", "--break-glass", given=sealed)

    assert (done.returncode, desk.has("out")) == (65, False)
    assert broken.stdout == b"salary"
    assert b"kms: warning: --break-glass: neither the context nor the origin" in broken.stderr


def test_break_glass_still_wants_every_byte_genuine(desk: Desk) -> None:
    sealed = bytearray(sealed_at(desk, given=bytes(100_000)))
    for at in (150, len(sealed) - 1):
        sealed[at] ^= 1
        done = desk.kms("open", "-i", "key.txt", "--break-glass", "-o", "out", given=bytes(sealed))
        sealed[at] ^= 1

        assert (done.returncode, desk.has("out")) == (65, False)


def test_a_file_bound_to_nothing_is_refused_where_a_context_is_asked_for(desk: Desk) -> None:
    sealed = desk.made("seal", "-r", desk.recipient, given=b"salary")
    done = desk.kms("open", "-i", "key.txt", "--context", PROD, given=sealed)

    assert (done.returncode, done.stdout) == (65, b"")
    assert b"bound to no context" in done.stderr


def test_a_context_past_its_time_opens_nothing(desk: Desk) -> None:
    past, future = ("not_after=2020-01-01T00:00:00Z", "not_after=2999-01-01T00:00:00Z")

    assert desk.made("open", "-i", "key.txt", "--context", future, given=sealed_at(desk, future)) == b"salary"
    done = desk.kms("open", "-i", "key.txt", "--context", past, given=sealed_at(desk, past))
    assert (done.returncode, done.stdout) == (65, b"")
    assert desk.kms("seal", "-i", "key.txt", "--context", "not_after=soon").returncode == 65


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
def test_a_file_that_others_bound_to_a_context_is_refused(desk: Desk, forger: type[Identities]) -> None:
    version = version_of(desk.identity.recipient)
    others = forger({version: desk.identity})
    forged = sealing.seal(b"raise", others, others.ref(version), Context.parse(PROD))
    done = desk.kms("open", "-i", "key.txt", "--context", PROD, given=forged)

    assert (done.returncode, done.stdout) == (65, b"")
    assert desk.made("open", "-i", "key.txt", "--break-glass", given=forged) == b"raise"


# -- keys --------------------------------------------------------------------------------------------


def test_stock_age_opens_a_bound_file(desk: Desk) -> None:
    identity = pyrage.x25519.Identity.from_str(desk.identity.export())

    assert pyrage.decrypt(sealed_at(desk), [identity]) == b"salary"


@pytest.mark.parametrize(
    "kind", [x25519.X25519Identity, mlkem768x25519.HybridIdentity], ids=["x25519", "hybrid"]
)
def test_the_last_identity_of_a_file_seals_and_any_opens(
    desk: Desk, kind: type[x25519.X25519Identity] | type[mlkem768x25519.HybridIdentity]
) -> None:
    newer = kind.generate()
    older = sealed_at(desk)
    write_key(desk.key, desk.identity, newer)
    newest = sealed_at(desk)

    assert f" {version_of(newer.recipient)} ".encode() in newest
    for sealed in (older, newest):
        assert desk.made("open", "-i", "key.txt", "--context", PROD, given=sealed) == b"salary"


def test_a_key_version_that_is_not_at_hand_is_named(desk: Desk) -> None:
    sealed = sealed_at(desk)
    version = version_of(desk.identity.recipient)
    write_key(desk.key, x25519.X25519Identity.generate())
    done = desk.kms("open", "-i", "key.txt", "--context", PROD, given=sealed)

    assert done.returncode == 65
    assert f"key version {version}".encode() in done.stderr


def test_the_key_id_is_in_the_file_and_checked(desk: Desk) -> None:
    sealed = desk.made("seal", "-i", "key.txt", "--key-id", "payroll", given=b"salary")

    assert b" payroll " in sealed
    assert desk.made("open", "-i", "key.txt", given=sealed) == b"salary"
    assert desk.kms("seal", "-i", "key.txt", "--key-id", "pay roll").returncode == 65


# -- the pad -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "padded"), [(MIB - 1, False), (MIB, True), (MIB + 1, True)])
def test_the_header_fills_4_kib_from_1_mib_on(desk: Desk, size: int, padded: bool) -> None:
    desk.write("in", bytes(size))
    for sealed in (
        desk.made("seal", "-i", "key.txt", "in"),
        desk.made("seal", "-i", "key.txt", given=bytes(size)),
    ):
        assert (parse(sealed, FILE_LIMITS).size == 4096) == padded
        assert desk.made("open", "-i", "key.txt", given=sealed) == bytes(size)

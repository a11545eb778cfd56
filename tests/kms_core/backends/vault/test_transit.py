"""The transit backend against a real OpenBao, and what the bao command makes of its wraps."""

import base64
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest
from structlog.testing import capture_logs

from kms_core import keyring
from kms_core.backends import KeyMissing
from kms_core.backends.file_token import FileToken
from kms_core.backends.vault.client import VaultClient
from kms_core.backends.vault.transit import TransitCipher
from kms_core.envelope import sealing
from kms_core.http_client import Busy, PeerServer, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed
from support import openbao
from support.age_kms import ROW_7, head_of
from support.clock import Clock
from support.contract.faults import Fault, Faulty, answer, faulty, hangs_up
from support.openbao import Bao, BaoRefused, transit
from support.settings_files import read

SECRET: Final = bytes(range(16))
AAD: Final = b"names and a context"


@pytest.fixture
def server() -> Bao:
    return openbao.bao()


@pytest.fixture
def key(server: Bao) -> str:
    return server.new_key()


@pytest.fixture
def cipher(server: Bao, key: str) -> TransitCipher:
    return transit(server, key)


def names(cipher: TransitCipher) -> list[str]:
    return [version.version for version in cipher.versions()]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# -- what a wrap is ------------------------------------------------------------------------------------


def by_the_command(server: Bao, key: str, wrapped: bytes, *more: str) -> bytes:
    """What ``bao`` decrypts a wrap of version 1 to."""
    words = ("write", "-field=plaintext", f"transit/decrypt/{key}", f"ciphertext=vault:v1:{b64(wrapped)}")
    return base64.b64decode(server.cli(*words, *more))


def test_the_command_opens_a_wrap_with_its_associated_data_and_not_without(
    server: Bao, key: str, cipher: TransitCipher
) -> None:
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    assert len(wrapped) == 12 + len(SECRET) + 16
    assert by_the_command(server, key, wrapped, f"associated_data={b64(AAD)}") == SECRET
    for wrong in ((), (f"associated_data={b64(b'other')}",), (f"context={b64(AAD)}",)):
        with pytest.raises(BaoRefused, match="message authentication failed"):
            by_the_command(server, key, wrapped, *wrong)


@pytest.mark.parametrize("kind", ["aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"])
def test_every_type_with_aead_is_taken_and_binds_the_aad(server: Bao, kind: str) -> None:
    cipher = transit(server, server.new_key(type=kind))
    wrapped = cipher.encrypt(SECRET, cipher.versions()[-1].version, AAD)

    assert cipher.decrypt(wrapped, "1", AAD) == SECRET
    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, "1", b"other")


@pytest.mark.parametrize("version", ["0", "01", "2", "-1", "1:", "latest", "9" * 30])
def test_a_version_that_is_not_there_decrypts_nothing(cipher: TransitCipher, version: str) -> None:
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, version, AAD)


# -- versions ------------------------------------------------------------------------------------------


def test_a_rotation_here_or_by_the_command_is_seen_and_the_old_version_wraps_on(
    server: Bao, key: str, cipher: TransitCipher
) -> None:
    assert cipher.rotate().created_at is not None
    server.cli("write", "-f", f"transit/keys/{key}/rotate")

    assert names(cipher) == ["1", "2", "3"]
    for version in ("1", "3"):
        assert cipher.decrypt(cipher.encrypt(SECRET, version, AAD), version, AAD) == SECRET


def test_versions_below_the_minimum_of_decryption_are_gone_trimmed_or_not(
    server: Bao, key: str, cipher: TransitCipher
) -> None:
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    cipher.rotate()
    server.cli("write", f"transit/keys/{key}/config", "min_decryption_version=2")

    assert names(cipher) == ["2"]
    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, "1", AAD)
    server.cli("write", f"transit/keys/{key}/config", "min_encryption_version=2")
    server.admin("POST", f"transit/keys/{key}/trim", {"min_available_version": 2})
    assert names(cipher) == ["2"]


def test_a_version_below_the_minimum_of_encryption_is_not_replaced_by_another(
    server: Bao, key: str, cipher: TransitCipher
) -> None:
    cipher.rotate()
    server.admin("POST", f"transit/keys/{key}/config", {"min_encryption_version": 2})

    with pytest.raises(BackendUnavailable, match="no longer encrypts with the version"):
        cipher.encrypt(SECRET, "1", AAD)
    with pytest.raises(BackendUnavailable, match="no longer encrypts with the version"):
        cipher.encrypt(SECRET, "3", AAD)


@pytest.mark.parametrize("after", [True, False], ids=["after its effect", "before it"])
def test_a_rotation_whose_answer_is_lost_is_looked_up_and_not_repeated(
    server: Bao, key: str, *, after: bool
) -> None:
    path = f"/v1/transit/keys/{key}/rotate".encode()
    with server.losing(path, after=after) as front:
        cipher = transit(server, key, address=front.url)
        if after:
            assert cipher.rotate().version == "2"
        else:
            with pytest.raises(Unreachable):
                cipher.rotate()

        assert sum(path in request for request in front.requests) == 1
    assert len(transit(server, key).versions()) == (2 if after else 1)


# -- keys that are missing, or not fit ------------------------------------------------------------------


CALLS: Final[dict[str, Callable[[TransitCipher], object]]] = {
    "encrypt": lambda cipher: cipher.encrypt(SECRET, "1", AAD),
    "decrypt": lambda cipher: cipher.decrypt(bytes(44), "1", AAD),
    "versions": lambda cipher: cipher.versions(),
    "rotate": lambda cipher: cipher.rotate(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_key_is_not_made_by_the_way_but_by_the_command_in_the_error(server: Bao, call: str) -> None:
    key = server.new_key() + "x"
    cipher = transit(server, key, token=openbao.ROOT_TOKEN)  # which may make keys
    with pytest.raises(KeyMissing) as caught:
        CALLS[call](cipher)
    with pytest.raises(httpx.HTTPStatusError):
        server.admin("GET", f"transit/keys/{key}")
    command = caught.value.detail.partition("`bao ")[2].partition("`")[0]
    server.cli(*command.split())

    assert names(cipher) == ["1"]
    server.admin("POST", f"transit/keys/{key}/config", {"deletion_allowed": True})
    server.admin("DELETE", f"transit/keys/{key}")
    with pytest.raises(KeyMissing, match="make it with"):
        CALLS[call](cipher)


@pytest.mark.parametrize("call", ["versions", "rotate"])
@pytest.mark.parametrize(
    ("made", "because"),
    [
        ({"derived": True}, "is derived"),
        ({"type": "rsa-2048"}, "of a type that cannot bind contexts"),
        ({"type": "ed25519"}, "of a type that cannot bind contexts"),
        ({"type": "hmac", "key_size": 32}, "of a type that cannot bind contexts"),
    ],
    ids=["derived", "rsa", "signing", "hmac"],
)
def test_keys_that_do_not_bind_the_aad_are_refused(
    server: Bao, made: dict[str, object], because: str, call: str
) -> None:
    cipher = transit(server, server.new_key(**made))

    with pytest.raises(BackendUnavailable, match=because):
        CALLS[call](cipher)


def test_no_derived_key_encrypts(server: Bao) -> None:
    with pytest.raises(BackendUnavailable):
        CALLS["encrypt"](transit(server, server.new_key(derived=True)))


# -- the server, the mount, our rights -----------------------------------------------------------------


def test_a_sealed_server_is_unreachable_until_it_is_unsealed(tmp_path: Path) -> None:
    own = Bao(tmp_path)
    try:
        cipher = transit(own, own.new_key())
        wrapped = cipher.encrypt(SECRET, "1", AAD)
        own.cli("operator", "seal")
        for call in CALLS.values():
            with pytest.raises(Unreachable, match="is sealed: run `bao operator unseal`"):
                call(cipher)
        own.unseal()

        assert cipher.decrypt(wrapped, "1", AAD) == SECRET
    finally:
        own.close()


@pytest.mark.parametrize("call", CALLS)
def test_a_revoked_token_is_named_by_its_setting(server: Bao, key: str, call: str) -> None:
    token = server.token()
    cipher = transit(server, key, token=token)
    cipher.versions()
    server.admin("POST", "auth/token/revoke", {"token": token})

    with pytest.raises(BackendUnavailable, match="token_file") as caught:
        CALLS[call](cipher)
    assert token not in caught.value.detail
    assert not isinstance(caught.value, Unreachable | Busy)


def test_a_policy_that_lacks_a_path_is_told_which(server: Bao, key: str) -> None:
    cipher = transit(server, key, token=server.token(policies=["default"]))

    with pytest.raises(BackendUnavailable, match=f"let its policy allow transit/decrypt/{key}"):
        CALLS["decrypt"](cipher)


def of_root(server: Bao, mount: str, namespace: str | None = None) -> TransitCipher:
    vault = openbao.vault(server.url, token=openbao.ROOT_TOKEN, namespace=namespace)
    return TransitCipher(vault, mount, "pay")


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_mount_is_told_with_the_command_that_enables_it(server: Bao, call: str) -> None:
    cipher = of_root(server, "nowhere")

    with pytest.raises(BackendUnavailable, match="`bao secrets enable -path=nowhere transit`"):
        CALLS[call](cipher)


def test_a_mount_of_several_segments_works(server: Bao) -> None:
    server.cli("secrets", "enable", "-path=team/a/transit", "transit")
    server.cli("write", "-f", "team/a/transit/keys/pay")
    cipher = of_root(server, "team/a/transit")

    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET


def test_a_namespace_is_entered(server: Bao) -> None:
    server.cli("namespace", "create", "payroll")
    server.cli("secrets", "enable", "-namespace=payroll", "transit")
    server.cli("write", "-namespace=payroll", "-f", "transit/keys/pay")
    inside, elsewhere = (of_root(server, "transit", namespace) for namespace in ("payroll", "nowhere"))

    assert inside.decrypt(inside.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET
    with pytest.raises(BackendUnavailable, match=r"no such namespace: check kms\.vault_kv\.namespace"):
        elsewhere.versions()


# -- the token -----------------------------------------------------------------------------------------


def timed(server: Bao | Faulty, key: str, token: FileToken, clock: Clock) -> TransitCipher:
    place = PeerServer(server.url, "OpenBao or Vault", "kms.transit.address", 10.0)
    return TransitCipher(VaultClient(place, token, None, clock), "transit", key)


def renewals(server: Bao, token: str) -> int:
    """The second of its last renewal; 0 if there was none."""
    found: int = server.admin("POST", "auth/token/lookup", {"token": token})["data"].get(
        "last_renewal_time", 0
    )
    return found


def test_a_token_is_renewed_at_half_of_its_life(server: Bao, key: str) -> None:
    token, clock = server.token(ttl="1h"), Clock()
    cipher = timed(server, key, FileToken(token, None, strict=True), clock)
    cipher.versions()
    clock.now += 1790
    cipher.versions()
    before = renewals(server, token)
    clock.now += 20
    cipher.versions()

    assert not before
    assert renewals(server, token)


RECORD: Final = b'{"data": {"type": "aes256-gcm96", "latest_version": 1, "keys": {"1": 1795546983}}}'
LOOKUP: Final = b'{"data": {"ttl": 3600, "renewable": true}}'


def lease(seconds: int) -> Fault:
    return answer(200, b'{"auth": {"lease_duration": %d}}' % seconds)


@pytest.mark.parametrize(
    ("renewal", "told", "next_s"),
    [
        (lease(3600), [], 1800),
        (lease(1000), ["token.expires"], 500),
        (answer(400, b'{"errors": ["lease is not renewable"]}'), ["token.not_renewed"], None),
        (answer(403, b'{"errors": ["permission denied"]}'), ["token.not_renewed"], None),
        (answer(500), ["token.not_renewed"], 30),
        (answer(503), ["token.not_renewed"], 30),
        (hangs_up, ["token.not_renewed"], 30),
        (answer(200, b"[]"), ["token.not_renewed"], None),
    ],
    ids=["renewed", "less than asked", "refused", "forbidden", "busy", "sealed", "hangs up", "odd"],
)
def test_a_renewal_never_fails_the_call_that_it_comes_with(
    renewal: Fault, told: list[str], next_s: int | None
) -> None:
    def act(connection: socket.socket) -> None:
        path = front.requests[-1].split(b" ", 2)[1]
        acts = {b"/v1/auth/token/lookup-self": answer(200, LOOKUP), b"/v1/auth/token/renew-self": renewal}
        acts.get(path, answer(200, RECORD))(connection)

    clock = Clock()
    with faulty(act) as front, capture_logs() as logs:
        cipher = timed(front, "pay", FileToken("s.token", None, strict=True), clock)
        cipher.versions()
        clock.now += 1801
        assert names(cipher) == ["1"]
        tried = asked(front, "renew-self")
        clock.now += (next_s or 100_000) - 1
        cipher.versions()
        early = asked(front, "renew-self")
        clock.now += 2
        cipher.versions()

    assert (tried, early) == (1, 1)
    assert asked(front, "renew-self") == (1 if next_s is None else 2)
    assert asked(front, "lookup-self") == 1
    assert [entry["event"] for entry in logs][: len(told)] == told


def asked(front: Faulty, path: str) -> int:
    return sum(path.encode() in request for request in front.requests)


def test_a_token_without_end_is_looked_up_once(server: Bao, key: str) -> None:
    clock = Clock()
    with server.losing(b"", after=False) as front:
        cipher = timed(front, key, FileToken(openbao.ROOT_TOKEN, None, strict=True), clock)
        cipher.versions()
        clock.now += 10**9
        cipher.versions()

    assert (asked(front, "lookup-self"), asked(front, "renew-self")) == (1, 0)


def test_a_token_that_cannot_be_renewed_is_told_of_once(server: Bao, key: str) -> None:
    clock = Clock()
    token = server.token(ttl="1h", renewable=False)
    cipher = timed(server, key, FileToken(token, None, strict=True), clock)
    with capture_logs() as logs:
        cipher.versions()
        clock.now += 10_000
        cipher.versions()

    assert [entry["event"] for entry in logs] == ["token.expires"]


def test_a_new_token_in_the_file_is_used_at_once(server: Bao, key: str, tmp_path: Path) -> None:
    file, token = tmp_path / "token", server.token()
    write(file, token)
    cipher = transit(server, key, token_file=file)
    cipher.versions()
    server.admin("POST", "auth/token/revoke", {"token": token})
    with pytest.raises(BackendUnavailable, match="token_file"):
        cipher.versions()
    write(file, server.token() + "\n")

    assert cipher.versions()
    assert cipher.token.changes == 1


@pytest.mark.parametrize("content", [None, "", "two\nlines"], ids=["missing", "empty", "lines"])
def test_while_the_file_holds_no_token_the_last_one_is_used(
    server: Bao, key: str, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "token"
    write(file, server.token())
    cipher = transit(server, key, token_file=file)
    file.unlink()
    if content is not None:
        write(file, content)
    with capture_logs() as logs:
        assert cipher.versions()
        assert cipher.versions()

    assert [entry["event"] for entry in logs] == ["token.reload_failed"]


def write(file: Path, token: str) -> None:
    file.touch(0o600)
    file.write_text(token)


# -- through the settings ------------------------------------------------------------------------------


def test_a_key_of_the_settings_seals_and_opens(server: Bao, tmp_path: Path) -> None:
    write(tmp_path / "token", server.token())
    text = f"""
[kms.keys]
default = "transit:{server.new_key()}"
[kms.transit]
address = "{server.url}"
token_file = "{tmp_path / "token"}"
"""
    key = keyring.build(read(tmp_path, text)).default
    ref = key.ref("acme")
    file = sealing.seal(b"salary", [(key.backend, ref)], ROW_7)
    head = head_of(file)

    assert head.stanzas[0].args == ("kms-service/wrap", "transit", "default", "1")
    assert (
        sealing.open_(file, head, sealing.unwrap_file(head, key.backend, ref, context=ROW_7).file_key)
        == b"salary"
    )

"""``age-plugin-kms`` under the real ``age`` and ``rage``, over a service and without one."""

import os
import sys
from base64 import b64decode
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS
from support.age_plugin import ENV, Bench, target
from support.programs import program
from support.service import Json, b64

SECRET: Final = b"salary: 4711\n"
OTHER: Final = "env=dev"


@pytest.fixture
def age() -> str:
    return program("age")


def decrypted(toolbench: Bench, file: bytes) -> Json:
    found: Json = toolbench.post("decrypt", {"ciphertext": b64(file), "context": ENV}).json()
    return found


def as_by_age(toolbench: Bench, key_id: str) -> bytes:
    """A file as the tool and the plugin make it, without the cost of two processes."""
    file_key, nonce = os.urandom(16), os.urandom(16)
    answer = toolbench.post("wrap", {"file_key": b64(file_key), "context": ENV, "key_id": key_id})
    stanza = header.parse_stanzas(b64decode(answer.json()["stanza"]), FILE_LIMITS)
    return header.render(stanza, file_key) + nonce + stream.seal(stream.payload_key(file_key, nonce), SECRET)


def encrypted(toolbench: Bench, age: str, key_id: str | None = None) -> Path:
    """A file that the stock tool makes for a key of the service."""
    path = toolbench.folder / "sealed.age"
    toolbench.ok(age, "-r", target(key_id).recipient(), "-o", str(path), stdin=SECRET)
    return path


# -- both ways, by whichever door ----------------------------------------------------------------------


@pytest.mark.parametrize("key_id", ["default", "vault", "both", "pq"])
def test_what_stock_age_makes_opens_by_itself_and_by_the_service(
    toolbench: Bench, age: str, key_id: str
) -> None:
    path = encrypted(toolbench, age, key_id)

    shown = decrypted(toolbench, path.read_bytes())

    assert toolbench.ok(age, "-d", "-i", toolbench.identity(target()), str(path)) == SECRET
    assert b64decode(shown["plaintext"]) == SECRET
    assert (shown["key_id"], shown["origin"]) == (key_id, "service")


@pytest.mark.parametrize("key_id", ["default", "vault"])
def test_stock_age_opens_what_the_service_made(toolbench: Bench, age: str, key_id: str) -> None:
    made = toolbench.seal(SECRET, key_id=key_id)

    assert toolbench.ok(age, "-d", "-i", toolbench.identity(target(key_id)), stdin=made) == SECRET


RAGE: Final = """
import sys
from pyrage import decrypt, encrypt
from pyrage.plugin import Identity, IdentityPluginV1, Recipient, RecipientPluginV1

class Silent:
    def display_message(self, message): raise AssertionError(message)
    confirm = request_public_string = request_passphrase = display_message

direction, name = sys.argv[1:]
given = sys.stdin.buffer.read()
if direction == "-e":
    plugin = RecipientPluginV1("kms", [Recipient.from_str(name)], [], Silent())
    sys.stdout.buffer.write(encrypt(given, [plugin]))
else:
    plugin = IdentityPluginV1("kms", [Identity.from_str(name)], Silent())
    sys.stdout.buffer.write(decrypt(given, [plugin]))
"""


def test_rage_and_age_open_each_others_files(toolbench: Bench, age: str) -> None:
    """By pyrage, which is the library that rage is made of: no package of Debian brings rage."""
    path = encrypted(toolbench, age)
    rage = (sys.executable, "-c", RAGE)

    by_rage = toolbench.ok(*rage, "-e", target("vault").recipient(), stdin=SECRET)

    assert toolbench.ok(*rage, "-d", target().identity(), stdin=path.read_bytes()) == SECRET
    assert toolbench.ok(age, "-d", "-i", toolbench.identity(target()), stdin=by_rage) == SECRET


@pytest.mark.parametrize(("key_id", "context"), [("default", ""), ("vault", OTHER)])
def test_the_context_is_bound(toolbench: Bench, age: str, key_id: str, context: str) -> None:
    mine = toolbench.identity(target(key_id, context))
    done = toolbench.run(age, "-d", "-i", mine, stdin=as_by_age(toolbench, key_id))

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"the file is for key " + key_id.encode() in done.stderr
    assert b"no identity matched" in done.stderr


def test_an_identity_encrypts_too(toolbench: Bench, age: str) -> None:
    mine = toolbench.identity(target("vault"))
    sealed = toolbench.ok(age, "-e", "-i", mine, stdin=SECRET)

    assert toolbench.ok(age, "-d", "-i", mine, stdin=sealed) == SECRET


def test_an_ordinary_recipient_beside_it_opens_without_the_service(toolbench: Bench, age: str) -> None:
    own = toolbench.folder / "own.txt"
    public = toolbench.kms("keygen", "-o", str(own)) + toolbench.kms("keygen", "-y", str(own))
    recipient = public.decode().split()[-1]
    sealed = toolbench.ok(age, "-r", recipient, "-r", target("vault").recipient(), stdin=SECRET)

    assert (
        toolbench.ok(age, "-d", "-i", str(own), stdin=sealed, PATH="/usr/bin:/bin:/usr/local/bin") == SECRET
    )
    assert b64decode(decrypted(toolbench, sealed)["plaintext"]) == SECRET


def test_a_rewrap_turns_it_into_an_ordinary_file_of_the_key(toolbench: Bench, age: str) -> None:
    made = as_by_age(toolbench, "default")
    key_file = toolbench.service.state / "age" / "private_key.txt"
    mine = toolbench.run(age, "-d", "-i", str(key_file), stdin=made)

    answer = toolbench.post("rewrap", {"ciphertext": b64(made), "context": ENV})
    rewrapped = b64decode(answer.json()["ciphertext"])

    assert mine.returncode == 1
    assert toolbench.ok(age, "-d", "-i", str(key_file), stdin=rewrapped) == SECRET


def test_without_a_service_the_key_file_opens_it(toolbench: Bench) -> None:
    key_file = str(toolbench.service.state / "age" / "private_key.txt")

    assert (
        toolbench.kms("open", "-i", key_file, "--context", ENV, stdin=as_by_age(toolbench, "default"))
        == SECRET
    )


def test_a_large_file_streams_through_the_tool(toolbench: Bench, age: str) -> None:
    """The plugin sees 16 bytes of it."""
    path, size = toolbench.folder / "large", 100 * 1024 * 1024
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(os.urandom(4096))
    script = (
        f'"{age}" -r "{target("vault").recipient()}" <large | '
        f'"{age}" -d -i "{toolbench.identity(target("vault"))}" | sha256sum'
    )

    assert toolbench.ok("sh", "-c", script).split()[0].decode() == sha256(path.read_bytes()).hexdigest()


# -- in the process of the tool ------------------------------------------------------------------------


def test_keys_of_the_settings_do_without_a_service(toolbench: Bench, age: str) -> None:
    here = target("both", in_process=True)
    alone = toolbench.within(
        KMS_CONFIG=str(toolbench.service.config),
        KMS_STATE_DIR=str(toolbench.service.state),
        KMS_SERVICE_URL="http://127.0.0.1:1",
    )
    sealed = alone.ok(age, "-r", here.recipient(), stdin=SECRET)

    assert alone.ok(age, "-d", "-i", toolbench.identity(here), stdin=sealed) == SECRET
    assert b64decode(decrypted(toolbench, sealed)["plaintext"]) == SECRET


def test_a_relative_settings_path_is_refused(toolbench: Bench, age: str) -> None:
    done = toolbench.run(age, "-r", target(in_process=True).recipient(), stdin=SECRET, KMS_CONFIG="kms.toml")

    assert done.returncode == 1
    assert b"requires an absolute path in KMS_CONFIG" in done.stderr


# -- who may -------------------------------------------------------------------------------------------


def test_the_tool_says_what_the_service_refused(toolbench: Bench, age: str) -> None:
    made = as_by_age(toolbench, "default")
    toolbench.token("decrypt")

    done = toolbench.run(age, "-d", "-i", toolbench.identity(target()), stdin=made)

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"this token lacks `unwrap`" in done.stderr


def test_a_recipient_cannot_send_the_token_elsewhere(toolbench: Bench, age: str) -> None:
    elsewhere = toolbench.kms("--url", "https://kms.example.com", "recipient", "--with-url").decode().strip()

    done = toolbench.run(age, "-r", elsewhere, stdin=SECRET)

    assert done.returncode == 1
    assert b"the token in KMS_TOKEN_FILE is for " + toolbench.service.url.encode() in done.stderr

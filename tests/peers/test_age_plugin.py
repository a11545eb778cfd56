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
from support.age_plugin import ENV, AgeTools, target
from support.programs import program
from support.service import Json, b64

SECRET: Final = b"salary: 4711\n"
OTHER: Final = "env=dev"


@pytest.fixture
def age() -> str:
    return program("age")


def decrypted(age_tools: AgeTools, file: bytes) -> Json:
    found: Json = age_tools.post("decrypt", {"ciphertext": b64(file), "context": ENV}).json()
    return found


def as_by_age(age_tools: AgeTools, key_id: str) -> bytes:
    """A file as the tool and the plugin make it, without the cost of two processes."""
    file_key, nonce = os.urandom(16), os.urandom(16)
    answer = age_tools.post("wrap", {"file_key": b64(file_key), "context": ENV, "key_id": key_id})
    stanza = header.parse_stanzas(b64decode(answer.json()["stanza"]), FILE_LIMITS)
    return header.render(stanza, file_key) + nonce + stream.seal(stream.payload_key(file_key, nonce), SECRET)


def encrypted(age_tools: AgeTools, age: str, key_id: str | None = None) -> Path:
    """A file that the stock tool makes for a key of the service."""
    path = age_tools.folder / "sealed.age"
    age_tools.ok(age, "-r", target(key_id).recipient(), "-o", str(path), stdin=SECRET)
    return path


# -- both ways, by whichever door ----------------------------------------------------------------------


@pytest.mark.parametrize("key_id", ["default", "vault", "both", "pq"])
def test_what_stock_age_makes_opens_by_itself_and_by_the_service(
    age_tools: AgeTools, age: str, key_id: str
) -> None:
    path = encrypted(age_tools, age, key_id)

    shown = decrypted(age_tools, path.read_bytes())

    assert age_tools.ok(age, "-d", "-i", age_tools.identity_file(target()), str(path)) == SECRET
    assert b64decode(shown["plaintext"]) == SECRET
    assert (shown["key_id"], shown["origin"]) == (key_id, "service")


@pytest.mark.parametrize("key_id", ["default", "vault"])
def test_stock_age_opens_what_the_service_made(age_tools: AgeTools, age: str, key_id: str) -> None:
    made = age_tools.seal(SECRET, key_id=key_id)

    assert age_tools.ok(age, "-d", "-i", age_tools.identity_file(target(key_id)), stdin=made) == SECRET


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


def test_rage_and_age_open_each_others_files(age_tools: AgeTools, age: str) -> None:
    """By pyrage, which is the library that rage is made of: no package of Debian brings rage."""
    path = encrypted(age_tools, age)
    rage = (sys.executable, "-c", RAGE)

    by_rage = age_tools.ok(*rage, "-e", target("vault").recipient(), stdin=SECRET)

    assert age_tools.ok(*rage, "-d", target().identity(), stdin=path.read_bytes()) == SECRET
    assert age_tools.ok(age, "-d", "-i", age_tools.identity_file(target()), stdin=by_rage) == SECRET


@pytest.mark.parametrize(("key_id", "context"), [("default", ""), ("vault", OTHER)])
def test_the_context_is_bound(age_tools: AgeTools, age: str, key_id: str, context: str) -> None:
    mine = age_tools.identity_file(target(key_id, context))
    done = age_tools.run(age, "-d", "-i", mine, stdin=as_by_age(age_tools, key_id))

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"the file is for key " + key_id.encode() in done.stderr
    assert b"no identity matched" in done.stderr


def test_an_identity_encrypts_too(age_tools: AgeTools, age: str) -> None:
    mine = age_tools.identity_file(target("vault"))
    sealed = age_tools.ok(age, "-e", "-i", mine, stdin=SECRET)

    assert age_tools.ok(age, "-d", "-i", mine, stdin=sealed) == SECRET


def test_an_ordinary_recipient_beside_it_opens_without_the_service(age_tools: AgeTools, age: str) -> None:
    own = age_tools.folder / "own.txt"
    public = age_tools.kms("keygen", "-o", str(own)) + age_tools.kms("keygen", "-y", str(own))
    recipient = public.decode().split()[-1]
    sealed = age_tools.ok(age, "-r", recipient, "-r", target("vault").recipient(), stdin=SECRET)

    assert (
        age_tools.ok(age, "-d", "-i", str(own), stdin=sealed, PATH="/usr/bin:/bin:/usr/local/bin") == SECRET
    )
    assert b64decode(decrypted(age_tools, sealed)["plaintext"]) == SECRET


def test_a_rewrap_turns_it_into_an_ordinary_file_of_the_key(age_tools: AgeTools, age: str) -> None:
    made = as_by_age(age_tools, "default")
    key_file = age_tools.service.state / "age" / "private_key.txt"
    mine = age_tools.run(age, "-d", "-i", str(key_file), stdin=made)

    answer = age_tools.post("rewrap", {"ciphertext": b64(made), "context": ENV})
    rewrapped = b64decode(answer.json()["ciphertext"])

    assert mine.returncode == 1
    assert age_tools.ok(age, "-d", "-i", str(key_file), stdin=rewrapped) == SECRET


def test_without_a_service_the_key_file_opens_it(age_tools: AgeTools) -> None:
    key_file = str(age_tools.service.state / "age" / "private_key.txt")

    assert (
        age_tools.kms("open", "-i", key_file, "--context", ENV, stdin=as_by_age(age_tools, "default"))
        == SECRET
    )


def test_a_large_file_streams_through_the_tool(age_tools: AgeTools, age: str) -> None:
    """The plugin sees 16 bytes of it."""
    path, size = age_tools.folder / "large", 100 * 1024 * 1024
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(os.urandom(4096))
    script = (
        f'"{age}" -r "{target("vault").recipient()}" <large | '
        f'"{age}" -d -i "{age_tools.identity_file(target("vault"))}" | sha256sum'
    )

    assert age_tools.ok("sh", "-c", script).split()[0].decode() == sha256(path.read_bytes()).hexdigest()


# -- in the process of the tool ------------------------------------------------------------------------


def test_keys_of_the_settings_do_without_a_service(age_tools: AgeTools, age: str) -> None:
    here = target("both", in_process=True)
    alone = age_tools.within(
        KMS_CONFIG=str(age_tools.service.config),
        KMS_STATE_DIR=str(age_tools.service.state),
        KMS_SERVICE_URL="http://127.0.0.1:1",
    )
    sealed = alone.ok(age, "-r", here.recipient(), stdin=SECRET)

    assert alone.ok(age, "-d", "-i", age_tools.identity_file(here), stdin=sealed) == SECRET
    assert b64decode(decrypted(age_tools, sealed)["plaintext"]) == SECRET


def test_a_relative_settings_path_is_refused(age_tools: AgeTools, age: str) -> None:
    done = age_tools.run(age, "-r", target(in_process=True).recipient(), stdin=SECRET, KMS_CONFIG="kms.toml")

    assert done.returncode == 1
    assert b"requires an absolute path in KMS_CONFIG" in done.stderr


# -- who may -------------------------------------------------------------------------------------------


def test_the_tool_says_what_the_service_refused(age_tools: AgeTools, age: str) -> None:
    made = as_by_age(age_tools, "default")
    age_tools.token_file("decrypt")

    done = age_tools.run(age, "-d", "-i", age_tools.identity_file(target()), stdin=made)

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"this token lacks `unwrap`" in done.stderr


def test_a_recipient_cannot_send_the_token_elsewhere(age_tools: AgeTools, age: str) -> None:
    elsewhere = age_tools.kms("--url", "https://kms.example.com", "recipient", "--with-url").decode().strip()

    done = age_tools.run(age, "-r", elsewhere, stdin=SECRET)

    assert done.returncode == 1
    assert b"the token in KMS_TOKEN_FILE is for " + age_tools.service.url.encode() in done.stderr

"""The token file: what rests there, who is let in by it, and commands that change it at once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
import pytest

from kms_core.auth import tokens
from kms_core.auth.tokens import Token, TokenFile, TokenRequest
from kms_protocol.errors import ConfigurationError, Conflict, Missing, Unauthenticated, Unavailable
from support.waiting import WAIT_S, until

HOUR: Final = timedelta(hours=1)
NONE: Final = timedelta()
LARGE: Final = b" " * 300_000
"""White space that makes a file too large to wait for."""
CREATE_MANY: Final = """
import sys
from pathlib import Path
from kms_core.auth import tokens

for number in range(5):
    wish = tokens.TokenRequest(f"{sys.argv[2]}-{number}", "default", ["encrypt"], None)
    tokens.create(Path(sys.argv[1]), wish)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "tokens.json"


def wish(name: str = "ci", tenant: str = "default", ttl: timedelta | None = HOUR) -> TokenRequest:
    return TokenRequest(name, tenant, ["encrypt key=ci-*", "jobs:read"], ttl)


@pytest.fixture
def made(path: Path) -> tuple[Token, str]:
    """A token in the file, and its text."""
    return tokens.create(path, wish())


@pytest.fixture
def text(made: tuple[Token, str]) -> str:
    return made[1]


def reason(file: TokenFile, text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        file.authenticate(text)
    assert not text or text not in str(caught.value)
    return caught.value.reason


def lets_in(file: TokenFile, text: str) -> bool:
    return bool(file.authenticate(text).id)


def edit(path: Path, change: Callable[[Token], Token]) -> None:
    """What an operator's hand could do to the file."""
    document = json.loads(path.read_text())
    changed = [change(msgspec.convert(token, Token, strict=False)) for token in document["tokens"]]
    path.write_bytes(msgspec.json.encode({"version": 1, "tokens": changed}))


def expire(path: Path) -> None:
    past = datetime.now(UTC) - HOUR
    edit(path, lambda token: msgspec.structs.replace(token, expires_at=past))


# -- being let in ----------------------------------------------------------------------------------------


def test_a_token_lets_its_holder_in(path: Path, made: tuple[Token, str]) -> None:
    token, text = made
    _, endless = tokens.create(path, wish("forever", ttl=None))
    found = TokenFile(path).authenticate(text)

    assert (found.id, found.name, found.tenant) == (token.id, "ci", "default")
    assert found.scopes == ("encrypt key=ci-*", "jobs:read")
    assert TokenFile(path).authenticate(endless).expires_at is None


def test_a_token_has_256_random_bits_behind_its_id(path: Path) -> None:
    texts = [tokens.create(path, wish(f"t{number}"))[1] for number in range(20)]

    assert all(tokens.TEXT.fullmatch(text) for text in texts)
    assert len({text[15:] for text in texts}) == 20
    assert len(texts[0][15:]) * 6 >= 256


def test_the_text_of_a_token_rests_nowhere(path: Path, text: str) -> None:
    """And the files are the owner's alone."""
    rests = b"".join(file.read_bytes() for file in path.parent.iterdir())

    assert text[15:].encode() not in rests
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()} == {
        "tokens.json": "0o600",
        "tokens.json.lock": "0o600",
    }
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda _: "", "malformed"),
        (lambda _: "kms_", "malformed"),
        (lambda text: text + "x", "malformed"),
        (lambda text: text + "\n", "malformed"),
        (lambda text: text.upper(), "malformed"),
        (lambda text: text[:-1] + ("A" if text[-1] != "A" else "B"), "unknown"),
        (lambda text: text[:15] + "A" * 43, "unknown"),
        (lambda text: "kms_aaaaaaaaaa" + text[14:], "unknown"),
    ],
    ids=["empty", "prefix", "longer", "line-end", "upper", "last", "secret", "id"],
)
def test_another_text_lets_nobody_in(path: Path, text: str, change: Callable[[str], str], why: str) -> None:
    assert reason(TokenFile(path), change(text)) == why


def test_the_secret_of_one_token_is_not_that_of_another(path: Path, text: str) -> None:
    _, other = tokens.create(path, wish("other"))

    assert reason(TokenFile(path), text[:15] + other[15:]) == "unknown"
    assert lets_in(TokenFile(path), text)


def test_a_token_that_expired_says_so_to_its_holder_alone(path: Path, made: tuple[Token, str]) -> None:
    token, text = made
    file = TokenFile(path)
    assert file.by_id(token.id) == token
    expire(path)

    assert reason(file, text) == "expired"
    assert reason(file, text[:15] + "A" * 43) == "unknown"
    assert (file.by_id(token.id), file.by_id("nobody")) == (None, None)


def test_a_token_is_valid_until_the_second_in_which_it_expires(made: tuple[Token, str]) -> None:
    expires_at = made[0].expires_at

    assert expires_at is not None
    assert made[0].has_expired(expires_at)
    assert not made[0].has_expired(expires_at - timedelta(microseconds=1))


# -- changes ---------------------------------------------------------------------------------------------


def test_changes_are_seen_at_once_without_a_restart(path: Path) -> None:
    """A revoked name is free again."""
    file = TokenFile(path)
    first, text = tokens.create(path, wish())
    assert lets_in(file, text)
    tokens.revoke(path, "ci")
    assert reason(file, text) == "unknown"
    second, _ = tokens.create(path, wish())

    assert first.id != second.id


def test_names_are_used_once_in_each_tenant(path: Path) -> None:
    with pytest.raises(Missing):
        tokens.revoke(path, "ci")
    tokens.create(path, wish())
    tokens.create(path, wish(tenant="other"))

    with pytest.raises(Conflict):
        tokens.create(path, wish())
    with pytest.raises(Conflict, match="Several"):
        tokens.revoke(path, "ci")
    assert tokens.revoke(path, "other/ci").tenant == "other"


def test_a_rotated_token_keeps_its_id_and_both_secrets_until_the_overlap_ends(
    path: Path, made: tuple[Token, str]
) -> None:
    token, old = made
    rotated, new = tokens.rotate(path, "ci", HOUR, None)
    file, past = TokenFile(path), datetime.now(UTC) - HOUR
    assert rotated.id == token.id == file.authenticate(new).id == file.authenticate(old).id
    assert rotated.expires_at == token.expires_at

    def expire_leases(token: Token) -> Token:
        digests = (msgspec.structs.replace(each, until=each.until and past) for each in token.digests)
        return msgspec.structs.replace(token, digests=tuple(digests))

    edit(path, expire_leases)
    assert reason(file, old) == "unknown"
    assert lets_in(file, new)


@pytest.mark.usefixtures("made")
def test_rotating_again_extends_no_old_secret(path: Path) -> None:
    once, _ = tokens.rotate(path, "ci", HOUR, None)
    twice, _ = tokens.rotate(path, "ci", 24 * HOUR, None)

    assert [digest.until for digest in twice.digests[2:]] == [once.digests[1].until]


def test_rotating_without_an_overlap_keeps_no_old_secret(path: Path, text: str) -> None:
    tokens.rotate(path, "ci", HOUR, None)
    token, new = tokens.rotate(path, "ci", NONE, None)

    assert [digest.sha256 for digest in token.digests] == [sha256(new.encode()).digest()]
    assert lets_in(TokenFile(path), new)
    assert reason(TokenFile(path), text) == "unknown"


def test_rotating_may_give_a_new_term(path: Path, made: tuple[Token, str]) -> None:
    rotated, _ = tokens.rotate(path, made[0].id, NONE, 3 * HOUR)

    assert rotated.expires_at is not None
    assert made[0].expires_at is not None
    assert rotated.expires_at > made[0].expires_at


def test_commands_that_run_at_once_lose_nothing(path: Path) -> None:
    commands = [
        subprocess.Popen([sys.executable, "-c", CREATE_MANY, str(path), f"command{number}"])
        for number in range(3)
    ]

    assert [command.wait(60) for command in commands] == [0] * 3
    assert len({token.name for token in tokens.read(path).tokens}) == 15


def test_a_command_that_was_killed_leaves_the_file_as_it_was(path: Path, text: str) -> None:
    (path.parent / ".tokens.json.tmp").write_text("half a fi")
    tokens.create(path, wish("next"))

    assert lets_in(TokenFile(path), text)
    assert not (path.parent / ".tokens.json.tmp").exists()


def test_callers_do_not_wait_while_a_large_file_is_read(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the tokens of before, from one reader for all."""
    file, before, may_read = TokenFile(path), path.read_bytes(), threading.Event()
    read, reads = tokens.read, []

    def slow(path: Path) -> tokens.TokensBody:
        reads.append(path)
        assert may_read.wait(WAIT_S)
        return read(path)

    assert lets_in(file, text)
    monkeypatch.setattr(tokens, "read", slow)
    path.write_bytes(b'{"tokens": []}' + LARGE)
    assert all(lets_in(file, text) for _ in range(20))
    until(lambda: reads, "a thread reads it")
    assert reads == [path]

    may_read.set()
    until(lambda: not file.tenants(), "the new file counts")
    assert reason(file, text) == "unknown"
    path.write_bytes(b"damaged" + LARGE)
    until(lambda: is_unreadable(file), "a large file that is damaged lets nobody in")
    path.write_bytes(before)
    assert lets_in(file, text), "a small one is read at once"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.chmod(0o666)], ids=["gone", "open"])
def test_what_was_read_of_an_earlier_file_lets_nobody_in(
    path: Path, text: str, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    """A thread has read it, and nobody asked before it was removed."""
    file, read, reads = TokenFile(path), tokens.read, list[tokens.TokensBody]()

    def noting(path: Path) -> tokens.TokensBody:
        reads.append(read(path))
        return reads[-1]

    assert lets_in(file, text)
    monkeypatch.setattr(tokens, "read", noting)
    path.write_bytes(path.read_bytes() + LARGE)
    assert lets_in(file, text)
    until(lambda: reads, "it is read")
    spoil(path)
    assert is_unreadable(file) or not file.tenants()

    path.unlink(missing_ok=True)
    path.write_bytes(b'{"tokens": []}')
    path.chmod(0o600)
    assert reason(file, text) == "unknown"


def is_unreadable(file: TokenFile) -> bool:
    try:
        file.tenants()
    except Unavailable:
        return True
    return False


# -- a file that cannot be believed ------------------------------------------------------------------------


def test_without_a_file_nobody_is_let_in_and_nobody_is_judged(path: Path, tmp_path: Path) -> None:
    _, text = tokens.create(tmp_path / "elsewhere.json", wish())

    assert reason(TokenFile(path), text) == "unknown"
    with pytest.raises(Unavailable):
        TokenFile(path).by_id(text[4:14])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 2}', b'{"tokens": [{"id": "x"}]}'], ids=repr
)
def test_a_file_of_another_make_lets_nobody_in_until_it_is_mended(
    path: Path, text: str, content: bytes
) -> None:
    file, good = TokenFile(path), path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(Unavailable):
        file.authenticate(text)
    with pytest.raises(ConfigurationError):
        tokens.read(path)
    path.write_bytes(good)

    assert lets_in(file, text)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_lets_nobody_in(path: Path, text: str, mode: int) -> None:
    path.chmod(mode)

    with pytest.raises(Unavailable):
        TokenFile(path).authenticate(text)


def test_a_file_that_all_may_read_is_refused_where_it_matters(path: Path, text: str) -> None:
    path.chmod(0o604)

    assert lets_in(TokenFile(path), text)
    with pytest.raises(Unavailable):
        TokenFile(path, strict=True).authenticate(text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_lets_nobody_in(path: Path, text: str) -> None:
    os.chown(path, 12345, -1)

    with pytest.raises(Unavailable):
        TokenFile(path).authenticate(text)

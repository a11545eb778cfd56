"""A line for each command of ``kms``, full of secrets, and what it reads from stdin."""

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

CommandLine = tuple[list[str], bytes]
RECIPIENT: Final = "age1c37e6mmd9a9fhnnygxwmv0g3taddw4nl9hj3x7mftsvjqt0cpq2sqrqn3n"


@dataclass(frozen=True)
class Given:
    """What lines are made of. Contexts and paths on them are their user's doing; secrets come by files."""

    context: str = ""
    plaintext: bytes = b""
    ciphertext: bytes = b""
    job_id: str = ""
    unknown_id: str = ""
    peer: str = ""
    peer_token: Path = Path()
    user_dir: Path = Path()
    state: Path = Path()


def lines(given: Given) -> dict[str, CommandLine]:
    """By the words of the command."""
    at, private, public = (
        given.user_dir,
        given.state / "age/private_key.txt",
        given.state / "age/public_key.txt",
    )
    context, files = ["--context", given.context], f"file://{given.state}/files"
    found: dict[str, CommandLine] = {
        "encrypt": (context, given.plaintext),
        "decrypt": (context, given.ciphertext),
        "generate-key": (context, b""),
        "rewrap": (context, given.ciphertext),
        "encrypt-file": ([*context, "-o", f"{at}/out-1", f"{at}/plain"], b""),
        "decrypt-file": ([*context, "-o", f"{at}/out-2", f"{at}/sealed"], b""),
        "rewrap-file": ([*context, "-o", f"{at}/out-3", f"{at}/sealed"], b""),
        "seal": (["-i", str(private), *context, "-o", f"{at}/out-4", f"{at}/plain"], b""),
        "open": (["-i", str(private), *context, "-o", f"{at}/out-5", f"{at}/sealed"], b""),
        "run": (["--env", f"SECRET={at}/sealed", *context, "--", "true"], b""),
        "job submit": (["encrypt", f"{files}/sealed", f"{files}/by-command", *context, "--wait"], b""),
        "job list": ([], b""),
        "job dead": ([], b""),
        "job result": ([given.job_id, "-o", f"{at}/out-6"], b""),
        "job group": (["nightly"], b""),
        "job release": ([given.job_id], b""),
        "token create": (["--name", "made", "--scope", "encrypt", "-o", f"{at}/made-token"], b""),
        "token rotate": (["caller", "-o", f"{at}/rotated-token"], b""),
        "token revoke": (["nobody"], b""),
        "token adopt": (["--yes"], b""),
        "keys adopt": (["default", "--yes"], b""),
        "keys usage": (["default"], b""),
        "keys rotate": (["default"], b""),
        "keygen": (["-o", f"{at}/new-key"], b""),
        "recipient": (context, b""),
        "completion": (["bash"], b""),
        "help": (["encrypt"], b""),
        "identity": (context, b""),
        "inspect": ([f"{at}/sealed"], b""),
        "audit tail": (context, b""),
        "audit receipt": ([given.unknown_id], b""),
        "audit acknowledge-loss": ([given.unknown_id], b""),
        "audit check-receipt": ([f"{at}/plain"], b""),
        "migrate transit": (
            [
                "--vault-address",
                given.peer,
                "--vault-token-file",
                str(given.peer_token),
                "--key",
                "k",
                *context,
            ],
            b"vault:v1:" + b64encode(given.plaintext),
        ),
        "migrate aws": (
            ["--endpoint-url", given.peer, "--region", "eu-1", *context],
            b64encode(given.plaintext),
        ),
        "backup": (["-r", RECIPIENT, "-o", f"{at}/backup.age"], b""),
        "restore": ([f"{at}/sealed", "-i", str(private), "--to", f"{at}/restored"], b""),
        "migrate sops": (["-R", str(public), f"{at}/plain"], b""),
    }
    found |= {f"job {name}": ([given.job_id], b"") for name in ("show", "wait", "cancel", "retry")}
    bare = (
        "keys list|token list|audit verify|audit key|cosmian init-key|config init|config lint"
        "|config show|doctor|status"
    )
    return found | dict.fromkeys((*bare.split("|"), "health"), ([], b""))


def leaves(command: click.Command, name: str = "") -> Iterator[str]:
    """Every command that does something, by its words."""
    if not isinstance(command, click.Group):
        yield name
        return
    ctx = click.Context(command)
    for word in command.list_commands(ctx):
        found = command.get_command(ctx, word)
        assert found is not None
        yield from leaves(found, f"{name} {word}".strip())

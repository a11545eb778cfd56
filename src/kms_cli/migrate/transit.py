"""``kms migrate transit``: ciphertexts of the transit engine of a Vault or an OpenBao."""

import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Unpack

import click
import msgspec

from kms_cli.migrate.command import Where, a_path, line_options, move, read_line
from kms_cli.migrate.pipeline import TargetFields
from kms_cli.session import session
from kms_client.settings import check_encrypted
from kms_core.backends.circuit_breaker import Guard, RetryPolicy
from kms_core.backends.vault.client import EngineAnswer, VaultClient, connect, path_of, said
from kms_core.observability import logs
from kms_core.settings.backends import TransitSection
from kms_core.settings.validate_backends import check_address
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, InvalidRequest
from kms_protocol.wire import ContextIn

DAMAGED = ("message authentication failed", "invalid ciphertext", "disallowed by policy")


class TransitLine(msgspec.Struct, forbid_unknown_fields=True):
    """An item of transit's ``batch_input``, and what the service shall make of it."""

    ciphertext: str
    context: bytes | None = None  # msgspec reads and writes bytes as base64
    associated_data: bytes | None = None
    key: str | None = None
    reference: str | None = None
    new_context: ContextIn = None
    new_key_id: str | None = None


class _PlaintextAnswer(msgspec.Struct):
    plaintext: bytes


class TransitSource:
    """One mount. What a line does not say is as in ``other``."""

    def __init__(self, vault: VaultClient, mount: str, other: TransitLine) -> None:
        self._vault = vault
        self._mount = path_of(mount, "--mount")
        self._other = other
        self._guard = Guard("transit", RetryPolicy())

    def read(self, text: bytes) -> tuple[TargetFields, Callable[[], bytes]]:
        line, other = read_line(text, "ciphertext", TransitLine), self._other
        key = line.key or other.key
        if key is None:
            raise InvalidRequest("No key is named: give --key, or key in the line")
        path = f"{self._mount}/decrypt/{path_of(key, 'The name of a transit key')}"
        document = {
            "ciphertext": line.ciphertext,
            "context": line.context or other.context,
            "associated_data": line.associated_data or other.associated_data,
        }
        given = {name: value for name, value in document.items() if value is not None}
        wanted = TargetFields(
            line.reference,
            other.new_context if line.new_context is None else line.new_context,
            line.new_key_id or other.new_key_id,
        )
        return wanted, lambda: self._guard.call("unwrap", lambda: self._open(path, given))

    def _open(self, path: str, document: Mapping[str, object]) -> bytes:
        answer = self._vault.call("POST", path, document)
        if answer.ok:
            return answer.read(EngineAnswer[_PlaintextAnswer]).data.plaintext
        told = said(answer)
        if any(word in told for word in DAMAGED):
            raise DecryptFailed
        no_engine = self._vault.no_engine(
            answer, self._mount, f"bao secrets enable -path={self._mount} transit"
        )
        raise no_engine or BackendUnavailable(
            f"{self._vault.server.where} does not take it at {path}: is the key there, and is it derived "
            "(then it needs its context)"
        )


class TransitOptions(Where):
    """Options of the command."""

    vault_address: str
    vault_token_file: Path
    vault_namespace: str | None
    vault_ca_file: Path | None
    mount: str
    key: str | None
    vault_context: bytes | None
    associated_data: bytes | None


def _base64(ctx: click.Context, parameter: click.Parameter, value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except (binascii.Error, ValueError) as exc:
        raise click.BadParameter("expected base64", ctx, parameter) from exc


@click.command("transit", short_help="From the transit engine of Vault or OpenBao.")
@click.option("--vault-address", required=True, help="https://host:port of the server.")
@click.option("--vault-token-file", required=True, type=a_path, help="File that holds a token for it.")
@click.option("--vault-namespace", help="Namespace of the mount.")
@click.option("--vault-ca-file", type=a_path, help="Trust the authorities in this file alone.")
@click.option("--mount", default="transit", show_default=True, help="Where the engine is mounted.")
@click.option("--key", help="Name of the key there.")
@click.option("--vault-context", callback=_base64, help="Context of a derived key, in base64.")
@click.option("--associated-data", callback=_base64, help="Associated data, in base64.")
@line_options
def transit_command(**given: Unpack[TransitOptions]) -> int:
    """Open ciphertexts with transit, and encrypt them with the service, each verified by decrypting it.

    A line of INPUTS, or of stdin, is vault:v1:… or JSON: ciphertext, and as they apply context and
    associated_data (base64, as in transit's batch_input), key, reference, new_context, new_key_id. --context
    and --key-id are the service's, for lines that name none.
    """
    logs.configure("warn", json=False)  # what the backend's code warns of goes to stderr too
    Context.parse(given["context"])
    check_address("--vault-address", given["vault_address"], in_prod=False)
    if not session().allow_http:
        check_encrypted(given["vault_address"])
    section = TransitSection(
        address=given["vault_address"],
        token_file=given["vault_token_file"],
        namespace=given["vault_namespace"],
        ca_file=given["vault_ca_file"],
    )
    other = TransitLine(
        "",
        given["vault_context"],
        given["associated_data"],
        given["key"],
        new_context=given["context"],
        new_key_id=given["key_id"],
    )
    return move(TransitSource(connect(section, "vault", strict=False), given["mount"], other), given)

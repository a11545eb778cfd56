"""``kms migrate transit`` and ``aws``: ciphertexts of the transit engine of Vault or OpenBao and of AWS."""

import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Unpack

import click
import msgspec

from kms_cli.migrate.command import MigrationOptions, a_path, line_options, migrate, read_line
from kms_cli.migrate.pipeline import TargetFields
from kms_cli.options import context_of
from kms_cli.session import session
from kms_client.settings import check_encrypted
from kms_core.backends.aws.client import AwsEndpoint, AwsKmsClient
from kms_core.backends.aws.settings import check_endpoint
from kms_core.backends.circuit_breaker import RetryingCaller, RetryPolicy
from kms_core.backends.vault.client import EngineAnswer, VaultClient, connect, path_of, said
from kms_core.backends.vault.settings import TransitSection
from kms_core.observability import logs
from kms_core.sections import check_address
from kms_protocol.context import Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, InvalidRequest
from kms_protocol.wire import ContextIn

DAMAGED = ("message authentication failed", "invalid ciphertext", "disallowed by policy")


class TransitLine(msgspec.Struct, forbid_unknown_fields=True):
    """An item of the ``batch_input`` of transit, and its target in the service."""

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
    """One mount. ``other`` has the defaults of lines."""

    def __init__(self, vault: VaultClient, mount: str, other: TransitLine) -> None:
        self._vault = vault
        self._mount = path_of(mount, "--mount")
        self._other = other
        self._caller = RetryingCaller("transit", RetryPolicy())

    def read(self, text: bytes) -> tuple[TargetFields, Callable[[], bytes]]:
        line, other = read_line(text, "ciphertext", TransitLine), self._other
        key = line.key or other.key
        if key is None:
            raise InvalidRequest("There is no key: give --key, or key in the line")
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
        return wanted, lambda: self._caller.call("unwrap", lambda: self._open(path, given))

    def _open(self, path: str, document: Mapping[str, object]) -> bytes:
        answer = self._vault.call("POST", path, document)
        if answer.ok:
            return answer.read(EngineAnswer[_PlaintextAnswer]).data.plaintext
        told = said(answer)
        if any(word in told for word in DAMAGED):
            raise DecryptFailed
        engine_error = self._vault.engine_error(
            answer, self._mount, f"bao secrets enable -path={self._mount} transit"
        )
        raise engine_error or BackendUnavailable(
            f"{self._vault.server.where} rejects it at {path}: check that the key exists, and its context if "
            "the key is derived"
        )


class TransitOptions(MigrationOptions):
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


@click.command("transit")
@click.option("--vault-address", required=True, help="https://host:port of the server.")
@click.option("--vault-token-file", required=True, type=a_path, help="File that holds a token for it.")
@click.option("--vault-namespace", help="Namespace of the mount.")
@click.option("--vault-ca-file", type=a_path, help="Trust only the certificate authorities in this file.")
@click.option("--mount", default="transit", show_default=True, help="MigrationOptions the engine is mounted.")
@click.option("--key", help="Name of the key in transit.")
@click.option("--vault-context", callback=_base64, help="Context of a derived key, in base64.")
@click.option("--associated-data", callback=_base64, help="Associated data, in base64.")
@line_options
def transit_command(**given: Unpack[TransitOptions]) -> int:
    """Decrypt ciphertexts with transit, encrypt them with the service, and verify each by decrypting it.

    A line of INPUTS, or of stdin, is vault:v1:… or JSON: ciphertext, and optionally context and
    associated_data (base64, as in transit's batch_input), key, reference, new_context, new_key_id. --context
    and --key-id are those of the service, for lines without them.
    """
    logs.configure("warn", json=False)  # warnings of the backend appear on stderr
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
    return migrate(TransitSource(connect(section, "vault", strict=False), given["mount"], other), given)


# -- AWS KMS -----------------------------------------------------------------------------------------

TIMEOUT_S = 10.0


class AwsLine(msgspec.Struct, forbid_unknown_fields=True):
    """The parameters of Decrypt by their names in AWS, and the target in the service."""

    ciphertext_blob: bytes = msgspec.field(name="CiphertextBlob")
    encryption_context: dict[str, str] | None = msgspec.field(name="EncryptionContext", default=None)
    key: str | None = msgspec.field(name="KeyId", default=None)
    reference: str | None = None
    new_context: ContextIn = None
    new_key_id: str | None = None


class _DecryptAnswer(msgspec.Struct, rename="pascal"):
    plaintext: bytes


class AwsSource:
    """One region. ``other`` has the defaults of lines."""

    def __init__(self, calls: AwsKmsClient, other: AwsLine) -> None:
        self._calls = calls
        self._other = other
        self._caller = RetryingCaller("awskms", RetryPolicy())

    def read(self, text: bytes) -> tuple[TargetFields, Callable[[], bytes]]:
        line, other = read_line(text, "CiphertextBlob", AwsLine), self._other
        bound = other.encryption_context if line.encryption_context is None else line.encryption_context
        asked = {
            "CiphertextBlob": line.ciphertext_blob,
            "EncryptionContext": bound,
            "KeyId": line.key or other.key,
        }
        given = {name: value for name, value in asked.items() if value}
        chosen = other.new_context if line.new_context is None else line.new_context
        wanted = TargetFields(
            line.reference, bound if chosen is None else chosen, line.new_key_id or other.new_key_id
        )
        return wanted, lambda: self._caller.call(
            "unwrap", lambda: self._calls.ask("Decrypt", given, _DecryptAnswer).plaintext
        )


class AwsOptions(MigrationOptions):
    """Options of the command."""

    region: str | None
    profile: str | None
    endpoint_url: str | None
    aws_ca_file: Path | None
    aws_key: str | None
    encryption_context: ContextIn


@click.command("aws")
@click.option("--region", help="Region of the keys.")
@click.option("--profile", help="Profile of ~/.aws/config.")
@click.option("--endpoint-url", help="Address instead of that of the region.")
@click.option("--aws-ca-file", type=a_path, help="Trust only the certificate authorities in this file.")
@click.option("--aws-key", help="Required key of the ciphertexts: its ARN, id or alias.")
@click.option(
    "--encryption-context",
    callback=context_of,
    help="Encryption context in AWS, as key=value,… or a JSON object.",
)
@line_options
def aws_command(**given: Unpack[AwsOptions]) -> int:
    """Decrypt ciphertexts with AWS KMS, encrypt them with the service, and verify each by decrypting it.

    A line of INPUTS, or of stdin, is a CiphertextBlob in base64 or JSON: CiphertextBlob, and optionally
    EncryptionContext, KeyId, reference, new_context, new_key_id. Without --context or new_context, the
    encryption context of AWS becomes the context in the service.
    """
    logs.configure("warn", json=False)  # warnings of the backend appear on stderr
    Context.parse(given["context"])
    if given["endpoint_url"]:
        check_endpoint("--endpoint-url", given["endpoint_url"], in_prod=False)
    place = AwsEndpoint(
        given["region"], given["endpoint_url"], given["profile"], given["aws_ca_file"], TIMEOUT_S
    )
    bound = dict(Context.parse(given["encryption_context"]).pairs) or None
    other = AwsLine(b"", bound, given["aws_key"], new_context=given["context"], new_key_id=given["key_id"])
    return migrate(AwsSource(AwsKmsClient(place), other), given)

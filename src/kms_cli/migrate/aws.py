"""``kms migrate aws``: ciphertexts of AWS KMS."""

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

import click
import msgspec

from kms_cli.migrate.command import Where, a_path, line_options, move, read_line
from kms_cli.migrate.pipeline import TargetFields
from kms_cli.options import context_of
from kms_core.backends.aws.client import AwsEndpoint, AwsKmsClient
from kms_core.backends.circuit_breaker import Guard, RetryPolicy
from kms_core.observability import logs
from kms_core.settings.validate_backends import check_aws_endpoint
from kms_protocol.context import Context
from kms_protocol.wire import ContextIn

TIMEOUT_S = 10.0


class AwsLine(msgspec.Struct, forbid_unknown_fields=True):
    """Decrypt's parameters by AWS's names, and what the service shall make of it."""

    ciphertext_blob: bytes = msgspec.field(name="CiphertextBlob")
    encryption_context: dict[str, str] | None = msgspec.field(name="EncryptionContext", default=None)
    key: str | None = msgspec.field(name="KeyId", default=None)
    reference: str | None = None
    new_context: ContextIn = None
    new_key_id: str | None = None


class _DecryptAnswer(msgspec.Struct, rename="pascal"):
    plaintext: bytes


class AwsSource:
    """One region. What a line does not say is as in ``other``."""

    def __init__(self, calls: AwsKmsClient, other: AwsLine) -> None:
        self._calls = calls
        self._other = other
        self._guard = Guard("awskms", RetryPolicy())

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
        return wanted, lambda: self._guard.call(
            "unwrap", lambda: self._calls.ask("Decrypt", given, _DecryptAnswer).plaintext
        )


class AwsOptions(Where):
    """Options of the command."""

    region: str | None
    profile: str | None
    endpoint_url: str | None
    aws_ca_file: Path | None
    aws_key: str | None
    encryption_context: ContextIn


@click.command("aws", short_help="From AWS KMS.")
@click.option("--region", help="Region of the keys.")
@click.option("--profile", help="Profile of ~/.aws/config.")
@click.option("--endpoint-url", help="Another address than the region's.")
@click.option("--aws-ca-file", type=a_path, help="Trust the authorities in this file alone.")
@click.option("--aws-key", help="The key that must have encrypted: its ARN, id or alias.")
@click.option("--encryption-context", callback=context_of, help="AWS's, as key=value,… or a JSON object.")
@line_options
def aws_command(**given: Unpack[AwsOptions]) -> int:
    """Open ciphertexts with AWS KMS, and encrypt them with the service, each verified by decrypting it.

    A line of INPUTS, or of stdin, is a CiphertextBlob in base64 or JSON: CiphertextBlob, and as they apply
    EncryptionContext, KeyId, reference, new_context, new_key_id. Without --context or new_context, AWS's
    encryption context becomes the service's context.
    """
    logs.configure("warn", json=False)  # what the backend's code warns of goes to stderr too
    Context.parse(given["context"])
    if given["endpoint_url"]:
        check_aws_endpoint("--endpoint-url", given["endpoint_url"], in_prod=False)
    place = AwsEndpoint(
        given["region"], given["endpoint_url"], given["profile"], given["aws_ca_file"], TIMEOUT_S
    )
    bound = dict(Context.parse(given["encryption_context"]).pairs) or None
    other = AwsLine(b"", bound, given["aws_key"], new_context=given["context"], new_key_id=given["key_id"])
    return move(AwsSource(AwsKmsClient(place), other), given)

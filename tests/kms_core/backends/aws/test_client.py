"""AWS KMS with scripted answers: every error, odd answers, signatures, what leaves the service."""

from collections.abc import Mapping
from typing import Final

import botocore.session
import pytest

from kms_core.backends.aws.backend import AwsCipher
from kms_core.backends.aws.client import ADVICE, ERRORS
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError
from support.aws_scripted import AAD, ARN, KEY, SECRET, Reply, b64, cipher_with, refused, scripted, working
from support.aws_servers import calls_to

OPERATIONS = [
    *("CreateAlias", "CreateKey", "Decrypt", "DescribeKey", "Encrypt"),
    *("GetKeyPolicy", "ListAliases", "ListResourceTags", "UpdateAlias"),
]


# -- errors ------------------------------------------------------------------------------------------


def test_every_error_that_aws_knows_for_our_calls_has_a_meaning() -> None:
    model = botocore.session.Session().get_service_model("kms")
    known = {error.name for name in OPERATIONS for error in model.operation_model(name).error_shapes}

    assert known <= ERRORS.ciphertext | ERRORS.busy | ADVICE.keys()
    assert len(ERRORS.ciphertext | ERRORS.busy | ADVICE.keys()) == sum(
        map(len, (ERRORS.ciphertext, ERRORS.busy, ERRORS.advice, ERRORS.credentials))
    )


DENIED: Final = "AccessDeniedException"
NOT_ALLOWED: Final = "User: arn:aws:iam::1:user/x is not authorized to perform: kms:Decrypt on resource: x"
UNKNOWN_KEY: Final = "The ciphertext refers to a customer master key that does not exist"
MEANINGS: Final[Mapping[str, tuple[Reply, type[KmsError], str]]] = {
    **{code: (refused(code), DecryptFailed, "") for code in sorted(ERRORS.ciphertext)},
    **{code: (refused(code), Busy, f"answers {code} to Decrypt") for code in sorted(ERRORS.busy)},
    **{
        code: (refused(code), BackendUnavailable, f"answers {code} to Decrypt with {ARN}: ")
        for code in sorted(ADVICE.keys() - {"AccessDenied", DENIED})
    },
    **{
        code: (refused(code), BackendUnavailable, "answers DisabledException to")
        for code in ("com.amazonaws.kms#DisabledException", "DisabledException:http://internal.amazon.com/x")
    },
    "not allowed": (refused(DENIED, NOT_ALLOWED), BackendUnavailable, "allow kms:Decrypt"),
    "a key unknown to AWS": (refused(DENIED, UNKNOWN_KEY), DecryptFailed, ""),
    **{
        f"status {status}": (refused("KMSInternalException", status=status), kind, "")
        for status, kind in ((429, Busy), (500, Busy), (502, Unreachable), (503, Unreachable))
    },
}


@pytest.mark.parametrize(("reply", "kind", "said"), MEANINGS.values(), ids=MEANINGS)
def test_each_error_of_aws_is_one_of_ours_that_says_what_to_mend(
    reply: Reply, kind: type[KmsError], said: str
) -> None:
    with cipher_with({"Decrypt": reply}) as (cipher, _), pytest.raises(KmsError) as told:
        cipher.decrypt(b"blob", KEY, AAD)

    assert type(told.value) is kind
    assert said in told.value.detail


def test_only_a_decryption_fails_as_one() -> None:
    with (
        cipher_with({"Encrypt": refused("InvalidCiphertextException")}) as (cipher, _),
        pytest.raises(BackendUnavailable),
    ):
        cipher.encrypt(SECRET, KEY, AAD)


@pytest.mark.parametrize("operation", ["Encrypt", "Decrypt"])
def test_no_error_holds_what_was_sent(operation: str) -> None:
    quoting = refused(f"Validation {SECRET.decode()}", f"Value '{SECRET.decode()}' at 'plaintext'")
    with cipher_with({operation: quoting}) as (cipher, _), pytest.raises(BackendUnavailable) as told:
        cipher.encrypt(SECRET, KEY, AAD) if operation == "Encrypt" else cipher.decrypt(SECRET, KEY, AAD)

    chain = [told.value, told.value.__cause__, told.value.__context__]
    assert not any(word in repr(chain) + str(chain) for word in (SECRET.decode(), b64(SECRET), AAD.decode()))


# -- odd answers -------------------------------------------------------------------------------------

ODD: Mapping[str, Reply] = {
    "nothing": (200, b""),
    "null": (200, b"null"),
    "a list": (200, b"[]"),
    "HTML": (200, b"<html>welcome</html>"),
    "an empty object": (200, {}),
    "numbers": (200, {"Plaintext": 5, "KeyId": 5, "CiphertextBlob": 5}),
    "no base64": (200, {"Plaintext": "%", "KeyId": ARN, "CiphertextBlob": "%"}),
    "a redirect": (301, b""),
    "an error in HTML": (404, b"<html>not found</html>"),
    "an error without a type": (400, {"message": "?"}),
    "an error with a strange type": (400, {"__type": 7}),
    "deep nesting": (200, b'{"a":' * 5000),
}


@pytest.mark.parametrize("reply", ODD.values(), ids=list(ODD))
def test_an_answer_that_aws_would_not_give_is_told_to_the_operator(reply: Reply) -> None:
    with cipher_with({"Encrypt": reply, "Decrypt": reply}) as (cipher, _):
        with pytest.raises(BackendUnavailable, match=r"kms\.awskms\.endpoint_url"):
            cipher.encrypt(SECRET, KEY, AAD)
        with pytest.raises(BackendUnavailable, match=r"kms\.awskms\.endpoint_url"):
            cipher.decrypt(b"blob", KEY, AAD)


def test_a_key_described_without_its_arn_is_refused() -> None:
    odd: Reply = (200, {"KeyMetadata": {"Arn": "elsewhere", "KeyId": KEY}})
    with cipher_with({"DescribeKey": odd}) as (cipher, _), pytest.raises(BackendUnavailable):
        cipher.versions()


def test_another_key_than_asked_for_is_refused() -> None:
    other = ARN.replace("1234abcd", "4321abcd")
    sealed: Reply = (200, {"CiphertextBlob": "AAAA", "KeyId": other})
    opened: Reply = (200, {"Plaintext": "AAAA", "KeyId": other})
    with cipher_with({"Encrypt": sealed, "Decrypt": opened}) as (cipher, _):
        with pytest.raises(BackendUnavailable):
            cipher.encrypt(SECRET, KEY, AAD)
        with pytest.raises(DecryptFailed):
            cipher.decrypt(b"blob", KEY, AAD)


def test_only_a_ciphertext_of_a_length_that_aws_takes_is_sent() -> None:
    """1 to 6,144 bytes (AWS KMS API reference, Decrypt, CiphertextBlob)."""
    with cipher_with({"Decrypt": (200, {"Plaintext": b64(SECRET), "KeyId": ARN})}) as (cipher, script):
        cipher.versions()
        for size in (0, 6145):
            with pytest.raises(DecryptFailed):
                cipher.decrypt(bytes(size), KEY, AAD)
        assert "Decrypt" not in dict(script.asked)

        assert cipher.decrypt(bytes(6144), KEY, AAD) == SECRET


# -- what leaves the service -------------------------------------------------------------------------


def test_each_call_is_signed_and_names_one_key_and_no_context_value() -> None:
    with cipher_with({}) as (cipher, script):
        assert cipher.decrypt(cipher.encrypt(SECRET, KEY, AAD), KEY, AAD) == SECRET

    assert script.bad_signatures == 0
    assert [operation for operation, _ in script.asked] == ["DescribeKey", "Encrypt", "Decrypt"]
    for _, asked in script.asked[1:]:
        context = asked["EncryptionContext"]
        assert asked["KeyId"] == ARN
        assert asked["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
        assert isinstance(context, dict)
        assert list(context) == ["kms-service"]
        assert len(context["kms-service"]) == 64
    assert not any(word in raw for raw in script.raw for word in (b"acme", b"payroll", b"prod"))


def test_aads_that_differ_are_different_contexts() -> None:
    with cipher_with({}) as (cipher, script):
        for aad in (AAD, AAD + b"!", b""):
            cipher.encrypt(SECRET, KEY, aad)

    assert len({str(asked["EncryptionContext"]) for name, asked in script.asked if name == "Encrypt"}) == 3


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(working) as (url, script):
        monkeypatch.setenv("http_proxy", url.replace("http://", "http://user:pa%20ss@"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        cipher = AwsCipher(calls_to("http://kms.example.invalid"), KEY)

        assert cipher.decrypt(cipher.encrypt(SECRET, KEY, AAD), KEY, AAD) == SECRET

    assert all(b"Proxy-Authorization: Basic dXNlcjpwYSBzcw==" in raw for raw in script.raw)
    assert all(b"Host: kms.example.invalid" in raw for raw in script.raw)
